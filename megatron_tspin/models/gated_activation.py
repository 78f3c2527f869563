"""SwiGLU between the two halves of the MLP, in one step each way."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tspin.models.autograd import run


class GatedSiLU(torch.nn.Module):
    """silu(gate) * up, for [..., 2 f] holding gate and up side by side; returns [..., f].

    megatron-core writes it as a chain of operations, of which autograd keeps the intermediates and joins two gradients
    by a copy. This one keeps its input alone. megatron-core 0.19 takes only torch modules for an activation.
    """

    def __init__(self, config: Any = None) -> None:
        """Takes what megatron-core builds an activation with."""
        super().__init__()

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """Activates."""
        return run(_SwiGLU, gate_and_up)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """No weights; megatron-core 0.16's MLP asks each of its modules for them, and torch's own cannot answer."""
        return {}


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
