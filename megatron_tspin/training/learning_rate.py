"""The learning rate of an optimizer step."""

import math

from megatron_tspin.config import OptimizerSection


def learning_rate(step: int, num_steps: int, peak: float, settings: OptimizerSection) -> float:
    """Learning rate of an optimizer step.

    It rises linearly over the warm-up steps and then falls to `min_lr`, which the step after the last would reach.

    Args:
        step: From 0.
        num_steps: Steps of the self-play iteration.
        peak: Learning rate at the end of the warm-up.
        settings: Shape of the schedule.
    """
    # Rounded first: 0.1 * 70 is 7.000000000000001 in floating point.
    warmup = math.ceil(round(settings.lr_warmup_fraction * num_steps, 9))
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.lr_decay_style == "constant":
        return peak
    progress = (step - warmup) / max(num_steps - warmup, 1)
    left = 1 - progress if settings.lr_decay_style == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.min_lr + (peak - settings.min_lr) * left
