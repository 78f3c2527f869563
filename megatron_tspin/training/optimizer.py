"""The paper's RMSProp, and AdamW, inside megatron-core's optimizers: fp32, bf16 with fp32 masters, sharded over DP."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_tspin.config import OptimizerSection, ParallelSection
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.precision import compute_dtype, core_fields


class RMSProp(torch.optim.AdamW):
    """RMSProp as an AdamW, because megatron-core shards no other optimizer over DP.

    v <- smoothing * v + (1 - smoothing) * g^2;  w <- w * (1 - lr * weight_decay) - lr * g / (sqrt(v) + eps), as
    torch.optim.RMSprop computes it without momentum; no bias correction. `betas[1]` is the smoothing; v is
    `exp_avg_sq`, and there is no `exp_avg`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Makes one update; a closure is not supported."""
        if closure is not None:
            raise ValueError("RMSProp.step takes no closure")
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            squares = [self._mean_square(parameter) for parameter in parameters]
            smoothing = group["betas"][1]
            torch._foreach_mul_(squares, smoothing)
            torch._foreach_addcmul_(squares, gradients, gradients, value=1 - smoothing)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_add_(roots, group["eps"])
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_addcdiv_(parameters, gradients, roots, value=-group["lr"])

    def _mean_square(self, parameter: torch.Tensor) -> torch.Tensor:
        self.init_state(parameter)
        state = self.state[parameter]
        state["step"] += 1
        square: torch.Tensor = state["exp_avg_sq"]
        return square

    def init_state(self, parameter: torch.Tensor) -> None:
        """Gives a parameter its state, unless it has one."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg_sq"] = torch.zeros_like(parameter)


def build_optimizer(
    chunks: list[Any], settings: OptimizerSection, parallel: ParallelSection, precision: PrecisionSection
) -> Any:
    """megatron-core's optimizer over a DDP-wrapped policy.

    Args:
        chunks: megatron-core's DistributedDataParallel, one a virtual stage.
        settings: Optimizer, decay and clipping; the learning rate is set before every step.
        parallel: Whether the state is sharded over DP.
        precision: bf16 or fp32; FP8 parameters.
    """
    is_rmsprop = settings.optimizer == "rmsprop"
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=0.0 if is_rmsprop else settings.adam_beta1,
        adam_beta2=settings.rmsprop_smoothing if is_rmsprop else settings.adam_beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=precision.bf16,
        params_dtype=compute_dtype(precision),
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        fp8_recipe=core_fields(precision).get("fp8_recipe"),  # how updated masters become FP8 parameters
    )
    optimizer = get_megatron_optimizer(config, chunks)
    for part in optimizer.chained_optimizers:
        for group in part.param_groups:
            # Megatron-LM's scheduler applies this factor, which is 0 for norms; there is no scheduler here.
            group["weight_decay"] = settings.weight_decay * group["wd_mult"]
        if is_rmsprop:
            _step_as_rmsprop(part)
    return optimizer


def _step_as_rmsprop(part: Any) -> None:
    """Makes the Adam that megatron-core built step as RMSProp; the groups stay."""
    inner = part.optimizer
    if isinstance(inner, torch.optim.AdamW):
        inner.__class__ = RMSProp
        part.init_state_fn = _init_states
        return
    # Transformer Engine's and apex's FusedAdam: beta1 = 0 without bias correction is the same update.
    for group in inner.param_groups:
        group["bias_correction"] = False


def _init_states(inner: RMSProp, config: OptimizerConfig | None = None) -> None:
    """What megatron-core calls to have a state of every parameter before the first step."""
    for group in inner.param_groups:
        for parameter in group["params"]:
            inner.init_state(parameter)


def gradient_norm(optimizer: Any) -> float:
    """Moves the reduced gradients to where the optimizer reads them; returns their global norm, not yet clipped."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def update(optimizer: Any, norm: float, lr: float, clip_grad: float) -> None:
    """Clips by the global norm and steps. `gradient_norm` must have been called first.

    The same steps as megatron-core's `ChainedOptimizer.step`, which would compute the norm again.
    """
    for part in optimizer.chained_optimizers:
        for group in part.param_groups:
            group["lr"] = lr
        if clip_grad > 0:
            clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
