"""Megatron's `forward_step` and `loss_func` over triplets.

megatron-core's schedules run them. The loss of a micro-batch is the SUM over its triplets; with
`calculate_per_token_loss` megatron-core divides the gradients once by the count that `loss_func` returns, summed over
micro-batches and replicas. That count is of triplets, so an update depends on neither packing, DP, PP nor the size of
micro-batches.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_tspin.config import ObjectiveSection
from megatron_tspin.objective.batches import MicroBatch
from megatron_tspin.objective.losses import ACTIVE_MARGIN, TripletLosses, triplet_losses
from megatron_tspin.objective.roles import ROLES
from megatron_tspin.objective.rows import Rows
from megatron_tspin.platform import device

LossFunc = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
ForwardStep = Callable[[Iterator[MicroBatch], Any], tuple[Tensor, LossFunc]]

SUMMED = (
    "num_triplets",
    "loss",
    *(f"log_prob_{role}" for role in ROLES),
    *(f"reward_{role}" for role in ROLES),
    *(f"tokens_{role}" for role in ROLES),
    "current_advantage",
    "historical_advantage",
    "current_margin",
    "active_share",
    "mean_slope",
    "identical_share",
    "teaching",
    "tokens",
    "places",
    "used",
    "prompt_tokens",
    "prompt_places",
    *(f"entropy_{role}" for role in ROLES),
    *(f"top_{role}" for role in ROLES),
)
"""What `loss_func` sums over a micro-batch, in this order. `teaching` counts the triplets that can move the policy at
all; for tokens and places see `Rows`; `entropy` and `top` (with diagnostics) are sums over response tokens."""


def make_forward_step(objective: ObjectiveSection, beta: float) -> ForwardStep:
    """Binds the objective of a self-play iteration into Megatron's `forward_step(data_iterator, model)`."""

    def forward_step(data_iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, LossFunc]:
        batch = next(data_iterator)
        return run_rows(batch.rows, model), partial(loss_func, batch, objective, beta)

    return forward_step


def run_rows(rows: Rows, model: Any) -> Tensor:
    """The policy's output for a micro-batch: sequence log-probs on the last stage."""
    place = device()
    output: Tensor = model(
        rows.tokens.to(place, non_blocking=True),
        rows.position_ids.to(place, non_blocking=True),
        targets=rows.targets.to(place),
        layout=rows.layout,
    )
    return output


def loss_func(
    batch: MicroBatch, objective: ObjectiveSection, beta: float, sequence_log_probs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a micro-batch.

    Args:
        batch: The micro-batch that was run.
        objective: The method.
        beta: Of this self-play iteration.
        sequence_log_probs: fp32 [num_triplets * len(batch.roles)], or the three rows of the head's diagnostics.

    Returns:
        The loss summed over triplets, the number of triplets (int), and the sums of `SUMMED` (float64, no gradient).
        Under context parallelism every rank has the whole loss, and only the first one counts the triplets.
    """
    place = sequence_log_probs.device
    kinds = 3 if batch.rows.targets.diagnostics else 1
    values = sequence_log_probs.view(kinds, batch.num_triplets, len(batch.roles))
    log_probs = dict(zip(batch.roles, values[0].unbind(1), strict=True))
    reference = None
    if batch.reference is not None:
        reference = dict(zip(batch.roles, batch.reference.to(place).unbind(1), strict=True))
    losses = triplet_losses(objective, beta, log_probs, reference, batch.lengths[:, 0].to(place))
    layout = batch.rows.layout
    counts = layout is None or layout.context.rank == 0
    count = torch.tensor(batch.num_triplets if counts else 0, dtype=torch.int, device=place)
    with torch.no_grad():
        sums = _sums(batch, objective, beta, log_probs, losses, values[1:].detach())
    return losses.loss.sum(), count, sums


def _sums(
    batch: MicroBatch,
    objective: ObjectiveSection,
    beta: float,
    log_probs: dict[str, Tensor],
    losses: TripletLosses,
    diagnostics: Tensor,
) -> Tensor:
    """The values of `SUMMED`; `diagnostics` is [0 or 2, num_triplets, roles]."""
    place, rows = losses.loss.device, batch.rows
    values: dict[str, Tensor | float] = {
        "num_triplets": float(batch.num_triplets),
        "loss": losses.loss,
        "tokens": float(rows.num_tokens),
        "places": float(rows.places),
        "used": float(rows.used),
        "prompt_tokens": float(rows.prompt_tokens),
        "prompt_places": float(rows.prompt_places),
        "identical_share": batch.identical.to(place),
        "teaching": _teaching(batch, objective, beta, losses),
    }
    values |= {f"log_prob_{role}": value for role, value in log_probs.items()}
    values |= {f"reward_{role}": value for role, value in losses.rewards.items()}
    values |= {f"tokens_{role}": batch.lengths[:, i] for i, role in enumerate(batch.roles)}
    for name, of_roles in zip(("entropy", "top"), diagnostics, strict=False):
        values |= {f"{name}_{role}": of_roles[:, i] for i, role in enumerate(batch.roles)}
    scale = objective.margin_scale
    if losses.current_margin is not None:
        values["current_advantage"] = losses.current_margin / scale
        values["current_margin"] = losses.current_margin
        values["active_share"] = losses.current_margin <= ACTIVE_MARGIN
        values["mean_slope"] = torch.sigmoid(-losses.current_margin)
    if losses.historical_margin is not None:
        values["historical_advantage"] = losses.historical_margin / scale
    summed = [torch.as_tensor(values.get(name, 0.0), dtype=torch.float64, device=place).sum() for name in SUMMED]
    return torch.stack(summed)


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
