"""What our own differentiable steps share: a typed way to run them, and how megatron-core gets a weight's gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def run(step: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """`step.apply(*arguments)`, for steps that return one tensor; torch leaves `apply` without types."""
    apply: Callable[..., Tensor] = step.apply
    return apply(*arguments)


def already_added(weight: Any) -> Tensor:
    """What backward returns for a parameter whose gradient it has added to `main_grad`, megatron-core's fp32 buffer.

    megatron-core's hook on the parameter has to fire, and must not add what it gets: the mark tells it so.
    """
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)
