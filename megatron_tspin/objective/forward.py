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
from megatron_tspin.heartbeat import beat
from megatron_tspin.objective.batches import MicroBatch
from megatron_tspin.objective.losses import triplet_losses
from megatron_tspin.objective.rows import Rows
from megatron_tspin.objective.step_sums import step_sums
from megatron_tspin.platform import device

LossFunc = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
ForwardStep = Callable[[Iterator[MicroBatch], Any], tuple[Tensor, LossFunc]]


def make_forward_step(objective: ObjectiveSection, beta: float) -> ForwardStep:
    """Binds the objective of a self-play iteration into Megatron's `forward_step(data_iterator, model)`."""

    def forward_step(data_iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, LossFunc]:
        batch = next(data_iterator)
        beat()
        return run_rows(batch.rows, model), partial(loss_func, batch, objective, beta)

    return forward_step


def run_rows(rows: Rows, model: Any) -> Tensor:
    """The policy's output for a micro-batch: sequence log-probs on the last pipeline stage."""
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
        sums = step_sums(batch, objective, beta, log_probs, losses, values[1:].detach())
    return losses.loss.sum(), count, sums
