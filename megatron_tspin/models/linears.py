"""megatron-core's linears and the head, with weights that a CPU multiplies with faster while nothing is trained.

oneDNN reads a weight fastest that it has laid out itself. Beside MKL's product, which torch calls for `x @ weight.T`,
that took 0.9 times as long with 2048 tokens, 0.7 with 64 and half with one (torch 2.13, fp32, two cores of an
AMD EPYC with AVX-512, layers of SmolLM2-135M). torch's compiler freezes weights into the same kernels
(`torch/_inductor/mkldnn_lowerings.py`).
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor


class PackedWeight:
    """A weight [n, k] in oneDNN's own layout: a copy of it, of use until it is changed.

    A change in place is noticed by torch's version counter, which what is written through `.data` passes by.

    Args:
        weight: fp32, on a CPU; see `can_be_packed`.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.detach()
        self._version = self._weight._version
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(self._weight, None)

    def product(self, tokens: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """The linear [..., n] of tokens [..., k]; None where it cannot be had from this copy."""
        if torch.is_grad_enabled() or self._weight._version != self._version:
            return None
        found: Tensor = torch.ops.mkldnn._linear_pointwise(tokens.contiguous(), self._packed, bias, "none", [], "")
        return found


def can_be_packed(weight: Tensor) -> bool:
    """Whether torch has the kernels for this weight."""
    return weight.dtype == torch.float32 and not weight.is_cuda and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class ColumnLinear(ColumnParallelLinear):
    """megatron-core's column-parallel linear."""

    packed: PackedWeight | None = None

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As megatron-core's: the output [..., n / TP], and the bias if another adds it."""
        if self.packed is not None and not (self.sequence_parallel or self.gather_output or args or kwargs):
            product = self.packed.product(input_, None if self.skip_bias_add else self.bias)
            if product is not None:
                return product, self.bias if self.skip_bias_add else None
        return super().forward(input_, *args, **kwargs)


class RowLinear(RowParallelLinear):
    """megatron-core's row-parallel linear."""

    packed: PackedWeight | None = None

    def forward(self, input_: Tensor) -> Any:
        """As megatron-core's: the output [..., n], and the bias if another adds it."""
        if self.packed is not None and self.input_is_parallel and not self.sequence_parallel:
            product = self.packed.product(input_)
            if product is not None:
                if self.tp_group.size() > 1 and not self.explicit_expert_comm:
                    product = reduce_from_tensor_model_parallel_region(product, group=self.tp_group)
                if self.skip_bias_add or self.bias is None:
                    return product, self.bias
                return product + self.bias, None
        return super().forward(input_)


def pack_weights(model: torch.nn.Module) -> None:
    """Lets the linears of a model multiply with packed weights where they can, until `unpack_weights`."""
    for module in _linears(model):
        if can_be_packed(module.weight):
            module.packed = PackedWeight(module.weight)


def unpack_weights(model: torch.nn.Module) -> None:
    """Gives the copies' memory back."""
    for module in _linears(model):
        module.packed = None


def _linears(model: torch.nn.Module) -> Iterator[ColumnLinear | RowLinear]:
    return (module for module in model.modules() if isinstance(module, ColumnLinear | RowLinear))
