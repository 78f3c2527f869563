"""What a rank holds of the policy's tensors, described to megatron-core, which reads and writes them in place.

A rank's part of a parameter is a rectangle of the whole tensor, or two (gate and up). The distributed optimizer cuts
that part, flattened, into a range for each DP rank. A range of a matrix is at most three rectangles: the rest of a row,
whole rows, the beginning of a row. Rectangles can be loaded under any other layout, and no rank has to gather anything.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_tspin.checkpoint.rectangles import rectangles
from megatron_tspin.models.policy import PolicyModel

_METADATA = {"non_homogeneous_layers": True}  # a name of its own for each layer, counted through the whole network
_WITH_EXPERTS = {**_METADATA, "singleton_local_shards": True}  # and for each expert


def bare_policies(model: torch.nn.Module | Sequence[torch.nn.Module]) -> list[PolicyModel]:
    """The policies of all virtual stages, whether given bare or in megatron-core's DistributedDataParallel."""
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    bare: list[Any] = [chunk if isinstance(chunk, PolicyModel) else chunk.module for chunk in chunks]
    assert all(isinstance(chunk, PolicyModel) for chunk in bare), f"no policy in {type(model).__name__}"
    return bare


def sharded_parameters(policies: Sequence[PolicyModel]) -> dict[str, Any]:
    """megatron-core's sharded tensors and factories of this rank by name, with the parameters themselves as data.

    Objects that layers add for Transformer Engine are left out: they are pickles, and empty here.
    """
    metadata = _METADATA if policies[0].architecture.experts is None else _WITH_EXPERTS
    trees = [policy.sharded_state_dict(metadata=dict(metadata)) for policy in policies]
    return {leaf.key: leaf for tree in trees for leaf in tree.values() if isinstance(leaf.data, torch.nn.Parameter)}


def whole_shards(sharded: Any, tensor: torch.Tensor, name: str) -> list[ShardedTensor]:
    """Describes a tensor that has the shape of this rank's part of a parameter.

    Args:
        sharded: The parameter, of `sharded_parameters`.
        tensor: Of the parameter's shape; what is described are views of it.
        name: Of the whole tensor in the checkpoint.
    """
    if isinstance(sharded, ShardedTensorFactory):
        built: list[ShardedTensor] = replace(sharded, key=name, data=tensor).build()
        return built
    return [replace(sharded, key=name, data=tensor, dtype=tensor.dtype)]


def range_shards(sharded: Any, flat: torch.Tensor, start: int, name: str) -> list[ShardedTensor]:
    """Describes a range of this rank's part of a parameter, of which no other DP rank holds anything.

    Args:
        sharded: The parameter, of `sharded_parameters`.
        flat: [length]; what is described are views of it.
        start: Of the range in the flattened part.
        name: Of the whole tensor in the checkpoint.
    """
    outline = torch.empty(sharded.data.shape, dtype=flat.dtype, device="meta")
    found, first = [], 0
    for block in whole_shards(sharded, outline, name):
        assert block.data.is_contiguous() and block.data.storage_offset() == first, "blocks lie one behind the other"
        low, high = max(start, first), min(start + flat.numel(), first + block.data.numel())
        position = low - start
        for offset, shape in rectangles(block.local_shape, low - first, high - first):
            size = math.prod(shape)
            found.append(_within(block, offset, flat[position : position + size].view(shape)))
            position += size
        first += block.data.numel()
    return found


def _within(block: ShardedTensor, offset: tuple[int, ...], data: torch.Tensor) -> ShardedTensor:
    """A rectangle of a block. DP is the last of what a replica is counted by."""
    return replace(
        block,
        data=data,
        local_shape=tuple(data.shape),
        global_offset=tuple(outer + inner for outer, inner in zip(block.global_offset, offset, strict=True)),
        axis_fragmentations=None,
        replica_id=(*block.replica_id[:-1], 0),
    )


def by_place(shards: Sequence[ShardedTensor]) -> dict[str, ShardedTensor]:
    """Shards under names that differ, as megatron-core wants them; a checkpoint knows them by their own name."""
    return {f"{shard.key}@{'.'.join(map(str, shard.global_offset))}": shard for shard in shards}
