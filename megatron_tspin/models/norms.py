"""Norms for megatron-core's layers, whose weights are marked for sequence parallelism.

megatron-core sums the gradients of marked parameters over TP, as each rank saw its part of the sequence. The signatures
are what its spec builder calls a norm with.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_tspin.models.autograd import run


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32.

    Args:
        config: megatron-core's.
        hidden_size: Size of the last dimension.
        eps: Added to the mean square.
        unit_offset: Multiply with 1 + weight instead, in fp32 (Gemma).
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, unit_offset: bool = False, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = _parameter(config, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalises [..., h]."""
        wide = hidden.float()
        return self._scaled(wide, wide.pow(2).mean(-1, keepdim=True), hidden.dtype)

    def _scaled(self, wide: Tensor, mean_square: Tensor, dtype: torch.dtype) -> Tensor:
        normal = wide * torch.rsqrt(mean_square + self.eps)
        if self.unit_offset:
            return (normal * (1.0 + self.weight.float())).to(dtype)
        return self.weight * normal.to(dtype)


class LayerNorm(torch.nn.Module):
    """torch's layer norm over the last dimension, with a bias."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, hidden_size)
        self.bias = _parameter(config, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalises [..., h]."""
        return torch.nn.functional.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)


class AllHeadsRMSNorm(torch.nn.Module):
    """`RMSNorm` of all heads as one vector, of which TP splits both the heads and the weight.

    Args:
        config: megatron-core's.
        hidden_size: Columns of a head.
        eps: Added to the mean square.
        heads: Heads of all ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, *, heads: int, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self._columns = heads * hidden_size
        self._group = get_tensor_model_parallel_group()
        self.weight = torch.nn.Parameter(
            torch.ones(self._columns // config.tensor_model_parallel_size, dtype=config.params_dtype)
        )
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, heads: Tensor) -> Tensor:
        """Normalises [s, b, heads of this rank, columns of a head]."""
        wide = heads.flatten(2).float()
        square = run(_SumOverShards, wide.pow(2).sum(-1, keepdim=True), self._group)
        normal = wide * torch.rsqrt(square / self._columns + self.eps)
        return (self.weight * normal.to(heads.dtype)).view_as(heads)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """For megatron-core's checkpoints: the weight is split along its one dimension."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )
        return state


class _SumOverShards(torch.autograd.Function):
    """Sum over TP in both directions: every rank's output depends on every rank's input."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _summed(values, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None


def _summed(values: Tensor, group: Any) -> Tensor:
    if group.size() == 1:
        return values
    total = values.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _parameter(config: Any, size: int) -> torch.nn.Parameter:
    made: Any = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype))
    made.sequence_parallel = config.sequence_parallel
    parameter: torch.nn.Parameter = made
    return parameter
