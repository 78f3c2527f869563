"""A checkpoint written anew: a distributed one as another layout's ranks write it, an HF one with other files or types.

Distributed checkpoints load under every layout as they are. One that was written by the layout which loads it is read
by each rank from fewer files, and not in parts that are larger than what it keeps.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_tspin.checkpoint.any_folder import check_summary
from megatron_tspin.checkpoint.core_folder import CoreFolder
from megatron_tspin.checkpoint.core_names import saved_name, stage_of
from megatron_tspin.checkpoint.core_writer import CoreWriter
from megatron_tspin.checkpoint.hf_folder import HFFolder
from megatron_tspin.checkpoint.hf_writer import SHARD_BYTES, HFWriter
from megatron_tspin.checkpoint.safetensors_stream import num_bytes
from megatron_tspin.checkpoint.tensor_check import weight_names
from megatron_tspin.config import ParallelSection
from megatron_tspin.log import progress_bar, track
from megatron_tspin.models.families.registry import tensors
from megatron_tspin.models.families.table import Split
from megatron_tspin.models.families.table import Tensor as Entry
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.storage import atomic_path


@torch.no_grad()
def reshard_core(source: Path, hf_checkpoint: Path, layout: ParallelSection, target: Path) -> None:
    """Writes the weights of a distributed checkpoint as the ranks of another layout would, in one process.

    One tensor is in memory at a time. The optimizer's state stays behind.

    Args:
        source: The checkpoint.
        hf_checkpoint: The HF folder it came from; its config.json says which tensors TP splits, and how.
        layout: TP and PP; replicas hold the same.
        target: The folder to write; appears whole.

    Raises:
        InputError: The checkpoint is of another architecture, or the layout does not fit.
        ArtifactError: The checkpoint is not whole.
    """
    architecture = read_architecture(hf_checkpoint)
    architecture.check_layout(layout)
    found = CoreFolder(source)
    check_summary(found, architecture)
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    lines = {saved_name(entry.core, found.headers): entry for entry in tensors(architecture)}
    order = list(dict.fromkeys(part.name for part in found.parts))  # the ranks', which is not the table's
    with atomic_path(target) as folder, CoreWriter(folder, found) as writer:
        for name in track(order, "reshard", len(order), "tensor"):
            entry = lines[name]
            whole = _padded(found.read(name), entry, tp)
            first = tp * stage_of(entry.core, architecture, pp)
            for rank, begin, size in _blocks(entry, tp):
                offset = [0] * whole.dim()
                offset[entry.dim] = begin
                block = whole.narrow(entry.dim, begin, size)
                writer.add(f"__{first + rank}_0.distcp", name, tuple(whole.shape), tuple(offset), block)
        writer.finish({"layout": {"tp": tp, "pp": pp, "dp": 1, "cp": 1}}, found.manifest["state"])


def _padded(whole: Tensor, entry: Entry, tp: int) -> Tensor:
    """The tensor with the rows of zeros that TP wants: a vocabulary is padded to a multiple of it."""
    (padding,) = {section.multiple for section in entry.layout.sections}
    if padding is None:
        return whole
    rows = entry.layout.shapes[0][0]
    padded = whole.new_zeros((entry.layout.sections[0].size(tp), *whole.shape[1:]))
    padded[:rows] = whole[:rows]
    return padded


def _blocks(entry: Entry, tp: int) -> Iterator[tuple[int, int, int]]:
    """What each TP rank writes of a tensor: the rank, where a block begins, and how long it is."""
    parts = 1 if entry.layout.split is Split.NONE else tp
    for rank in range(parts):
        begin = 0
        for section in entry.layout.sections:
            size = section.size(tp)
            yield rank, begin + size // parts * rank, size // parts
            begin += size


@torch.no_grad()
def rewrite_hf(source: Path, target: Path, shard_bytes: int | None = None, dtype: torch.dtype | None = None) -> None:
    """Writes an HF checkpoint with files of another size, or in another type; everything else is copied.

    Args:
        source: The HF folder.
        target: The folder to write; appears whole.
        shard_bytes: Most bytes of a file.
        dtype: Of all tensors, and in config.json; None keeps each as it is.

    Raises:
        InputError: The folder does not hold the tensors of its config.json, or a value does not fit into `dtype`.
    """
    found = HFFolder(source)
    architecture = read_architecture(source)
    found.check(architecture)
    names = weight_names(found.headers, architecture)
    sizes = {name: (found.shape(name), dtype or found.dtype(name)) for name in names}
    with atomic_path(target) as folder:
        writer = HFWriter(folder, sizes, SHARD_BYTES if shard_bytes is None else shard_bytes)
        with progress_bar("reshard", sum(num_bytes(*size) for size in sizes.values()), "B") as bar:
            for name, size in sizes.items():
                writer.add(name, found.read(name))
                bar.update(num_bytes(*size))
        writer.finish(source, dtype)
