"""What a micro-batch adds to the sums behind a step's metrics; `megatron_tspin/step_metrics.py` declares those."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_tspin.config import ObjectiveSection
from megatron_tspin.objective.batches import MicroBatch
from megatron_tspin.objective.losses import ACTIVE_MARGIN, TripletLosses
from megatron_tspin.objective.rows import Rows
from megatron_tspin.step_metrics import SUMMED, TEACHING


def step_sums(
    batch: MicroBatch,
    objective: ObjectiveSection,
    beta: float,
    log_probs: Mapping[str, Tensor],
    losses: TripletLosses,
    diagnostics: Tensor,
) -> Tensor:
    """The sums of `SUMMED` over a micro-batch, float64 [len(SUMMED)].

    Args:
        batch: The micro-batch that was run.
        objective: The method.
        beta: Of this self-play iteration.
        log_probs: log pi by role, fp32 [num_triplets].
        losses: Of its triplets.
        diagnostics: Entropy and top-1 agreement, each a sum over a response's tokens: [0 or 2, num_triplets, roles].
    """
    place = losses.loss.device
    values: dict[str, Tensor | float] = {
        "num_triplets": float(batch.num_triplets),
        "loss": losses.loss,
        "identical_share": batch.identical,
        TEACHING: _teaching(batch, objective, beta, losses),
        **_of_rows(batch.rows),
        **_of_roles(batch, log_probs, losses, diagnostics),
        **_of_margins(losses, objective.margin_scale),
    }
    assert values.keys() <= set(SUMMED), "a sum that no metric declares"
    # A quantity that the method does not have adds nothing.
    summed = [torch.as_tensor(values.get(name, 0.0), dtype=torch.float64, device=place).sum() for name in SUMMED]
    return torch.stack(summed)


def _of_rows(rows: Rows) -> dict[str, float]:
    return {
        "tokens": float(rows.num_tokens),
        "places": float(rows.places),
        "used": float(rows.used),
        "prompt_tokens": float(rows.prompt_tokens),
        "saved_prompt_tokens": float(rows.prompt_tokens - rows.prompt_places),
    }


def _of_roles(
    batch: MicroBatch, log_probs: Mapping[str, Tensor], losses: TripletLosses, diagnostics: Tensor
) -> dict[str, Tensor]:
    values = {f"log_prob_{role}": value for role, value in log_probs.items()}
    values |= {f"reward_{role}": value for role, value in losses.rewards.items()}
    values |= {f"tokens_{role}": batch.lengths[:, i] for i, role in enumerate(batch.roles)}
    for name, of_roles in zip(("entropy", "top"), diagnostics, strict=False):
        values |= {f"{name}_{role}": of_roles[:, i] for i, role in enumerate(batch.roles)}
    return values


def _of_margins(losses: TripletLosses, scale: float) -> dict[str, Tensor]:
    values = {}
    if losses.current_margin is not None:
        values["current_advantage"] = losses.current_margin / scale
        values["current_margin"] = losses.current_margin
        values["active_share"] = losses.current_margin <= ACTIVE_MARGIN
        values["mean_slope"] = torch.sigmoid(-losses.current_margin)
    if losses.historical_margin is not None:
        values["historical_advantage"] = losses.historical_margin / scale
    return values


def _teaching(batch: MicroBatch, objective: ObjectiveSection, beta: float, losses: TripletLosses) -> Tensor:
    """Bool [n]: whether a triplet's gradient is more than rounding, so that a step is worth making.

    RMSProp scales a vanishing gradient up to a full step; a global batch in which no triplet teaches makes no update.
    """
    place = losses.loss.device
    if losses.current_margin is None or objective.nll_weight:
        return torch.ones(batch.num_triplets, dtype=torch.bool, device=place)
    teaching = (losses.current_margin <= ACTIVE_MARGIN) & ~batch.identical.to(place)
    if beta and losses.historical_margin is not None:
        teaching |= (losses.historical_margin <= ACTIVE_MARGIN) & ~batch.stalled.to(place)
    return teaching
