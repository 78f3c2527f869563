"""What stands between the two halves of an MLP."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tspin.models.autograd import run

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda states: F.gelu(states, approximate="tanh"),
}


@cache
def activation_class(name: str, gated: bool) -> type[torch.nn.Module]:
    """The module class for what `Architecture.activation` names.

    Args:
        name: `silu`, `gelu` or `gelu_tanh`.
        gated: For [..., 2 f] holding gate and up side by side, return activation(gate) * up [..., f].
    """
    if name == "silu" and gated:
        return GatedSiLU
    return type(name, (_Gated if gated else _Plain,), {"activate": staticmethod(_FUNCTIONS[name])})


class _Activation(torch.nn.Module):
    """megatron-core 0.19 takes only torch modules for an activation."""

    activate: Callable[[Tensor], Tensor]

    def __init__(self, config: Any = None) -> None:
        """Takes what megatron-core builds an activation with."""
        super().__init__()

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """No weights; megatron-core 0.16's MLP asks each of its modules for them, and torch's own cannot answer."""
        return {}


class _Plain(_Activation):
    def forward(self, states: Tensor) -> Tensor:
        return self.activate(states)


class _Gated(_Activation):
    def forward(self, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        return self.activate(gate) * up


class GatedSiLU(_Activation):
    """silu(gate) * up, for [..., 2 f] holding gate and up side by side; returns [..., f].

    megatron-core writes it as a chain of operations, of which autograd keeps the intermediates and joins two gradients
    by a copy. This one keeps its input alone.
    """

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """Activates."""
        return run(_SwiGLU, gate_and_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        for_gate, for_up = result.chunk(2, dim=-1)
        torch.mul(gradients[0], F.silu(gate), out=for_up)
        torch.mul(gradients[0], up, out=for_gate)
        for_gate.copy_(torch.ops.aten.silu_backward(for_gate, gate))
        return result
