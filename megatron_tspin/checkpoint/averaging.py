"""The mean of several checkpoints of one architecture, one tensor at a time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from megatron_tspin.checkpoint.any_folder import Weights, open_weights
from megatron_tspin.checkpoint.core_folder import CoreFolder
from megatron_tspin.checkpoint.core_writer import CoreWriter
from megatron_tspin.checkpoint.hf_folder import HFFolder
from megatron_tspin.checkpoint.hf_writer import SHARD_BYTES, HFWriter
from megatron_tspin.checkpoint.safetensors_stream import num_bytes
from megatron_tspin.checkpoint.tensor_check import Header, weight_names
from megatron_tspin.errors import InputError
from megatron_tspin.log import progress_bar, track
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.storage import atomic_path

_SHOWN = 20


def average(folders: Sequence[Path], target: Path, shard_bytes: int | None = None) -> None:
    """Writes the mean of checkpoints of one kind; sums are in fp32, and each tensor keeps the first one's type.

    Of distributed checkpoints the mean has the parts of the first one, and no optimizer. What lies beside the weights
    of HF folders is copied from the first.

    Args:
        folders: At least two.
        target: The folder to write; appears whole.
        shard_bytes: Most bytes of a file, of HF folders.

    Raises:
        InputError: They are of two kinds or of several architectures; names what differs.
    """
    if len(folders) < 2:
        raise InputError(f"{folders[0]}: a mean needs at least two checkpoints")
    found = [open_weights(folder) for folder in folders]
    for other in found[1:]:
        if type(other) is not type(found[0]):
            raise InputError(
                f"{found[0].folder} and {other.folder}: one is an HF folder and one is not; convert or export one first"
            )
    with atomic_path(target) as folder, torch.no_grad():
        if isinstance(found[0], HFFolder):
            _average_hf(cast("list[HFFolder]", found), folder, SHARD_BYTES if shard_bytes is None else shard_bytes)
        elif shard_bytes is not None:
            raise InputError("--shard-size: only for HF folders; a distributed checkpoint has a file for each rank")
        else:
            _average_core(cast("list[CoreFolder]", found), folder)


def _average_hf(found: list[HFFolder], target: Path, shard_bytes: int) -> None:
    first = found[0]
    architecture = read_architecture(first.folder)
    for other in found:
        other.check(read_architecture(other.folder))
        facts = architecture.differences(read_architecture(other.folder))
        _refuse_others(first.folder, other.folder, facts, first.headers, other.headers)
    sizes = {name: (first.shape(name), first.dtype(name)) for name in weight_names(first.headers, architecture)}
    writer = HFWriter(target, sizes, shard_bytes)
    with progress_bar("average", sum(num_bytes(*size) for size in sizes.values()), "B") as bar:
        for name, size in sizes.items():
            writer.add(name, _mean(name, found))
            bar.update(num_bytes(*size))
    writer.finish(first.folder, None)


def _average_core(found: list[CoreFolder], target: Path) -> None:
    first = found[0]
    for other in found[1:]:
        one, two = (each.manifest["facts"]["architecture"] for each in (first, other))
        facts = {name: (one.get(name), two.get(name)) for name in {**one, **two} if one.get(name) != two.get(name)}
        _refuse_others(first.folder, other.folder, facts, first.headers, other.headers)
    with CoreWriter(target, first) as writer:
        for name in track(first.headers, "average", len(first.headers), "tensor"):
            mean = _mean(name, found)
            for part in first.parts_of(name):
                writer.add(part.file, name, tuple(mean.shape), part.offset, mean[part.where])
        state = {"averaged": [str(each.folder.resolve()) for each in found]}
        writer.finish({}, state)


def _mean(name: str, found: Sequence[Weights]) -> Tensor:
    """In the type of the first."""
    total: Tensor | None = None
    for each in found:
        values = each.read(name)
        if total is None:
            dtype = values.dtype
            total = values.to(torch.float64 if dtype == torch.float64 else torch.float32, copy=True)
        else:
            total.add_(values)
        del values  # before the next one is read
    assert total is not None
    return total.div_(len(found)).to(dtype)


def _refuse_others(
    first: Path,
    other: Path,
    facts: Mapping[str, tuple[object, object]],
    ours: Mapping[str, Header],
    theirs: Mapping[str, Header],
) -> None:
    lines = [f"{name} is {one} in the first and {two} in the second" for name, (one, two) in facts.items()]
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if name not in ours or name not in theirs:
            lines.append(f"tensor {name} is only in the {'first' if name in ours else 'second'}")
        elif ours[name].shape != theirs[name].shape:
            lines.append(
                f"tensor {name} is {list(ours[name].shape)} in the first and {list(theirs[name].shape)} in the second"
            )
    if lines:
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise InputError(
            "\n".join(
                [f"{first} and {other} are not of one architecture, so they have no mean:", *lines[:_SHOWN], *more]
            )
        )
