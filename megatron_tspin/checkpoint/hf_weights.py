"""HF weights into the policy of this rank, and out of all ranks into an HF folder."""

import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor

from megatron_tspin.checkpoint.core_names import EMBEDDING, LAYER, OUTPUT_LAYER, TABLE_NAMES, stage_of
from megatron_tspin.checkpoint.hf_folder import HFFolder
from megatron_tspin.checkpoint.hf_writer import SHARD_BYTES, HFWriter
from megatron_tspin.checkpoint.safetensors_stream import num_bytes
from megatron_tspin.errors import InputError
from megatron_tspin.log import progress_bar
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families.registry import tensors
from megatron_tspin.models.families.table import Range, Split
from megatron_tspin.models.families.table import Tensor as Entry
from megatron_tspin.models.fp8_linear import weights_changed
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.parallel import Topology
from megatron_tspin.storage import atomic_path

_EXPERT = re.compile(r"(?<=^mlp\.experts\.local_experts\.)\d+")


@torch.no_grad()
def load_hf(model: PolicyModel, topology: Topology) -> None:
    """Fills every parameter of this rank's part of the policy from the HF folder of its architecture.

    Each rank reads only the rows and columns that it holds. Values are cast to the parameters' dtype; the rows
    that pad the vocabulary become zero. With tied embeddings the last of several pipeline stages reads the embedding as
    its head.

    Raises:
        InputError: The folder does not hold exactly the tensors of the architecture, or the model has parameters that
            the family's table does not know.
    """
    source = HFFolder(model.architecture.folder)
    source.check(model.architecture)
    found = list(_local_weights(model, topology))
    parts = [(entry, part) for entry, _ in found for _, part in entry.ranges(topology.tp_rank, topology.tp_size)]
    total = sum(_stored_bytes(entry, part, source) for entry, part in parts)
    with progress_bar("read HF weights", total, "B", topology.speaks) as bar:
        for entry, parameter in found:
            if is_float8tensor(parameter):  # Transformer Engine quantises a tensor as a whole
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                _fill(values, entry, source, topology, bar.update)
                parameter.copy_(values)
            else:
                _fill(parameter, entry, source, topology, bar.update)
    weights_changed(model)


def _stored_bytes(entry: Entry, part: Range, source: HFFolder) -> int:
    """Bytes that a range takes in the file."""
    name = entry.hf[part.source]
    shape = source.shape(name)
    return math.prod(shape) // shape[entry.dim] * (part.stop - part.start) * source.dtype(name).itemsize


def _fill(
    parameter: Tensor, entry: Entry, source: HFFolder, topology: Topology, progress: Callable[[int], None]
) -> None:
    filled = 0
    for begin, part in entry.ranges(topology.tp_rank, topology.tp_size):
        length = part.stop - part.start
        target = parameter.narrow(entry.dim, begin, length)
        source.read_into(target, entry.hf[part.source], slice(part.start, part.stop), entry.dim, progress)
        filled += length
    if filled < parameter.shape[entry.dim]:  # the last rows of a padded vocabulary
        parameter.narrow(entry.dim, filled, parameter.shape[entry.dim] - filled).zero_()


def _local_weights(model: PolicyModel, topology: Topology) -> Iterator[tuple[Entry, torch.nn.Parameter]]:
    """Every parameter of this rank, once, with its line of the table."""
    lines = {entry.core: entry for entry in tensors(model.architecture)}
    if model.architecture.tied_embeddings:
        lines[OUTPUT_LAYER] = lines[EMBEDDING]
    first = _experts(model.architecture, topology).start
    parameters = {_global_name(name, model, first): parameter for name, parameter in model.named_parameters()}
    experts = _experts(model.architecture, topology)
    expected = {
        name
        for name, entry in lines.items()
        if stage_of(name, model.architecture, topology.pp_size) == topology.pp_rank
        and (entry.expert is None or entry.expert in experts)
    }
    if model.architecture.tied_embeddings and topology.pp_size == 1:
        expected.discard(OUTPUT_LAYER)  # one parameter serves both ends
    if set(parameters) != expected:
        unknown, absent = sorted(set(parameters) - expected), sorted(expected - set(parameters))
        raise InputError(
            f"{model.architecture.folder}: the model and the table of family {model.architecture.family} disagree; "
            f"parameters without a source: {unknown}; sources without a parameter: {absent}"
        )
    for name, parameter in parameters.items():
        shape = lines[name].core_shape(topology.tp_size)
        if tuple(parameter.shape) != shape:
            raise InputError(f"parameter {name} has shape {list(parameter.shape)}, its sources make {list(shape)}")
        yield lines[name], parameter


def _experts(architecture: Architecture, topology: Topology) -> range:
    """The experts that this rank holds a part of."""
    share = 0 if architecture.experts is None else architecture.experts.count // topology.ep_size
    return range(share * topology.ep_rank, share * (topology.ep_rank + 1))


def _global_name(name: str, model: PolicyModel, first_expert: int) -> str:
    """A parameter's name in the table: layer and expert counted through the whole network instead of this rank."""
    found = LAYER.match(name)
    if not found:
        return name
    layer = model.decoder.layers[int(found[1])].layer_number - 1
    part = _EXPERT.sub(lambda number: f"{first_expert + int(number[0])}", name[found.end() :])
    return f"decoder.layers.{layer}.{TABLE_NAMES.get(part, part)}"


@torch.no_grad()
def export_hf(
    model: PolicyModel,
    topology: Topology,
    source_hf: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    complete: Callable[[Path], None] = lambda folder: None,
    link: bool = False,
) -> None:
    """Writes the policy as an HF checkpoint, all ranks together.

    One rank's part of a parameter at a time travels to rank 0, which writes files of at most `shard_bytes` bytes (more
    only for a single larger tensor). Everything but the weights is copied from `source_hf`. The folder appears whole or
    not at all.

    Args:
        model: This rank's part.
        topology: This rank's place.
        source_hf: The HF checkpoint that the policy started from; gives config, tokenizer and each tensor's dtype.
        target: The folder to write; an existing one is replaced.
        dtype: Write all tensors in this dtype instead, and say so in config.json.
        shard_bytes: See above.
        complete: Called on rank 0 with the folder before it takes its name; if it raises, there is no export.
        link: Link what is the same in `source_hf` instead of copying it.

    Raises:
        InputError: `source_hf` is of another architecture than the model.
    """
    source = HFFolder(source_hf)
    source.check(read_architecture(source_hf))
    local = {entry.core: parameter for entry, parameter in _local_weights(model, topology)}
    order = list(tensors(model.architecture))
    if topology.rank != 0:
        for entry in order:
            _send(entry, local, model.architecture, topology)
    else:
        sizes = {
            name: (shape, dtype or source.dtype(name))
            for entry in order
            for name, shape in zip(entry.hf, entry.layout.shapes, strict=True)
        }
        with atomic_path(target) as folder:
            writer = HFWriter(folder, sizes, shard_bytes)
            total = sum(num_bytes(*size) for size in sizes.values())
            with progress_bar("write HF weights", total, "B") as bar:
                for entry in order:
                    for name, row, values in _gather(entry, local, model.architecture, topology):
                        writer.add(name, values, row)
                        bar.update(values.numel() * sizes[name][1].itemsize)
            writer.finish(source_hf, dtype, link)
            complete(folder)
            if target.is_dir():
                shutil.rmtree(target)
    dist.barrier()


def _send(entry: Entry, local: dict[str, torch.nn.Parameter], architecture: Architecture, topology: Topology) -> None:
    """Hands this rank's part of a weight to rank 0, if rank 0 needs it from here."""
    if topology.cp_rank + topology.cp_size * topology.dp_rank != _owner(entry, architecture, topology):
        return
    if stage_of(entry.core, architecture, topology.pp_size) != topology.pp_rank:
        return
    if entry.layout.split is Split.NONE and topology.tp_rank != 0:
        return
    dist.send(local[entry.core].detach().contiguous(), dst=0)


def _owner(entry: Entry, architecture: Architecture, topology: Topology) -> int:
    """Which of the ranks of CP x DP, CP being the faster, hands a tensor over: the first one that holds it."""
    if entry.expert is None or architecture.experts is None:
        return 0
    return entry.expert * topology.ep_size // architecture.experts.count


def _gather(
    entry: Entry, local: dict[str, torch.nn.Parameter], architecture: Architecture, topology: Topology
) -> Iterator[tuple[str, int, Tensor]]:
    """The HF tensors of a weight, on rank 0: name, first row and rows, one rank's part after the other.

    Where TP splits columns, a tensor comes whole, and once its last part is there.
    """
    like = next(iter(local.values()))
    by_columns = entry.layout.split is Split.COLUMNS
    whole = [torch.empty(shape, dtype=like.dtype) for shape in entry.layout.shapes] if by_columns else []
    stage = stage_of(entry.core, architecture, topology.pp_size)
    shape = entry.core_shape(topology.tp_size)
    for tp_rank in range(1 if entry.layout.split is Split.NONE else topology.tp_size):
        # Megatron's order of ranks: TP fastest, then CP, then DP, then PP.
        replica = _owner(entry, architecture, topology)
        rank = tp_rank + topology.tp_size * (replica + topology.cp_size * topology.dp_size * stage)
        if rank == 0:
            part = local[entry.core].detach()
        else:
            # Received whole and contiguous: gloo fills strided views with wrong values, silently.
            part = torch.empty(shape, dtype=like.dtype, device=like.device)
            dist.recv(part, src=rank)
        for begin, piece in entry.ranges(tp_rank, topology.tp_size):
            values = part.narrow(entry.dim, begin, piece.stop - piece.start)
            if by_columns:
                whole[piece.source].narrow(entry.dim, piece.start, piece.stop - piece.start).copy_(values)
            else:
                yield entry.hf[piece.source], piece.start, values
    yield from ((name, 0, values) for name, values in zip(entry.hf, whole, strict=by_columns))
