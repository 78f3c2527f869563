"""Sequence log-probs of given responses, by the forward pass that trains.

`tspin score`, the reference log-probs of SPIN and T-SPIN-ref, the parity gate and held-out evaluation use it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_tspin.log import progress_bar
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.objective.rows import Pair, Rows, pad_rows, row_length
from megatron_tspin.parallel import Topology, broadcast_from_last_stage, sum_over_replicas
from megatron_tspin.platform import device

_MICRO_BATCHES_PER_STAGE = 4


def score_pairs(
    model: PolicyModel,
    topology: Topology,
    pairs: Sequence[Pair],
    rows_per_batch: int = 8,
    description: str | None = None,
) -> list[float]:
    """Computes log pi(response given prompt) of each pair, the same list on every rank.

    Args:
        model: This rank's part of the policy.
        topology: The layout; pairs are spread over DP and pipelined over PP.
        pairs: Prompt ids (one or more) and response ids.
        rows_per_batch: Pairs in one forward pass.
        description: Draws a progress bar with this text.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    scores = torch.zeros(len(pairs), dtype=torch.float64, device=device())
    chunk = rows_per_batch * _MICRO_BATCHES_PER_STAGE * topology.pp_size
    starts = list(range(0, len(pairs), chunk))[topology.dp_rank :: topology.dp_size]
    mine = sum(len(pairs[start : start + chunk]) for start in starts)
    run_schedule = get_forward_backward_func()
    with torch.no_grad(), progress_bar(description or "", mine, "response", _draws(description, topology)) as bar:
        for start in starts:
            part = pairs[start : start + chunk]
            length = row_length(part, topology.tp_size)
            groups = [part[i : i + rows_per_batch] for i in range(0, len(part), rows_per_batch)]
            outputs = run_schedule(
                forward_step_func=_forward_step,
                data_iterator=iter([pad_rows(group, rows_per_batch, length) for group in groups]),
                model=[model],
                num_microbatches=len(groups),
                seq_length=length,
                micro_batch_size=rows_per_batch,
                forward_only=True,
                collect_non_loss_data=True,
            )
            if topology.is_last_stage:
                scores[start : start + len(part)] = torch.cat(outputs).double()
            bar.update(len(part))
    broadcast_from_last_stage(sum_over_replicas(scores, topology), topology)
    values: list[float] = scores.tolist()
    return values


def _draws(description: str | None, topology: Topology) -> bool:
    return description is not None and topology.speaks


def _forward_step(data_iterator: Iterator[Rows], model: PolicyModel) -> tuple[Tensor, object]:
    rows, place = next(data_iterator), device()
    output = model(rows.tokens.to(place), rows.position_ids.to(place), targets=rows.targets.to(place))
    return output, _keep


def _keep(sequence_log_probs: Tensor, non_loss_data: bool) -> Tensor:
    """The loss function of a pass that has none."""
    return sequence_log_probs
