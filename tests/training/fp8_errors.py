"""How far a policy in some number format is from fp32."""

from pathlib import Path
from typing import Any

from tests.training.trajectory import gradients, plain_gradients, weights


def errors(config: Any, ranks: Any, scratch: Path) -> tuple[float, float]:
    """Relative distance to fp32 of all log-probs and of the whole gradient."""
    import torch

    log_probs = ranks(config.parallel.world_size).run(gradients, config, scratch)
    expected, expected_gradients = plain_gradients(config)
    assert all(each == log_probs[0] for each in log_probs)
    found = weights(scratch)
    ours, theirs = torch.tensor(log_probs[0]), torch.tensor(expected)
    names = sorted(expected_gradients)
    ours_grad, theirs_grad = (
        torch.cat([each[n].float().flatten() for n in names]) for each in (found, expected_gradients)
    )
    return (
        ((ours - theirs).norm() / theirs.norm()).item(),
        ((ours_grad - theirs_grad).norm() / theirs_grad.norm()).item(),
    )
