"""Sequence log-probs of given responses, by the forward pass that trains.

`tspin score`, the reference log-probs of SPIN and T-SPIN-ref, the parity gate and held-out evaluation use it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tspin.log import progress_bar
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.models.row_layout import ContextShare
from megatron_tspin.objective.forward import run_rows
from megatron_tspin.objective.packing import Packing, Shape, plan_rows, work_model
from megatron_tspin.objective.rows import Pair, Rows, pack_row, row_length
from megatron_tspin.parallel import Topology, broadcast_from_last_pipeline_stage, sum_over_replicas, wait_for_all_ranks
from megatron_tspin.platform import device

_ROWS_PER_STAGE = 4
_ROW_TOKENS = 4096


def score_pairs(
    model: PolicyModel | Sequence[PolicyModel],
    topology: Topology,
    pairs: Sequence[Pair],
    row_tokens: int = _ROW_TOKENS,
    description: str | None = None,
) -> list[float]:
    """Computes log pi(response given prompt) of each pair, the same list on every rank.

    Rows are packed; neighbours with the same prompt share it.

    Args:
        model: This rank's part of the policy, or those of its virtual stages.
        topology: The layout; rows are spread over DP and pipelined over PP.
        pairs: Prompt ids (one or more) and response ids (one or more).
        row_tokens: Most tokens of a row; a longer prompt and response gets a row of its own.
        description: Draws a progress bar with this text.
    """
    scores = torch.zeros(len(pairs), dtype=torch.float64, device=device())
    chunks = [model] if isinstance(model, PolicyModel) else list(model)
    work = work_model(chunks[0].architecture)
    draws = description is not None and topology.speaks
    wait_for_all_ranks()  # ranks may come from loading the model, which takes one longer than another
    with torch.no_grad(), progress_bar(description or "", len(pairs), "response", draws) as bar:
        for bundles in _portions(
            _shared(pairs, row_tokens), row_tokens * _ROWS_PER_STAGE * topology.pp_size * topology.dp_size
        ):
            shapes = [bundle.shape for bundle in bundles]
            packing = Packing(
                capacity=max(row_tokens, *(shape.row_tokens(True) for shape in shapes)),
                multiple=topology.row_length_multiple,
                uniform=topology.equal_rows,
                row_count_multiple=topology.row_count_multiple,
            )
            planned = plan_rows(shapes, packing, work, topology.dp_size)[topology.dp_rank]
            members = [[bundles[i] for i in row.members] for row in planned]
            rows = [
                pack_row([(bundle.prompt, bundle.responses) for bundle in each], row.length, _context(topology))
                for each, row in zip(members, planned, strict=True)
            ]
            outputs = _run(chunks, rows)
            if topology.is_last_pipeline_stage:
                indices = [index for each in members for bundle in each for index in bundle.indices]
                scores[torch.tensor(indices, dtype=torch.int64, device=device())] = torch.cat(outputs).double()
            bar.update(sum(len(bundle.responses) for bundle in bundles))
    wait_for_all_ranks()  # replicas meet again only here, after all of their rows
    broadcast_from_last_pipeline_stage(sum_over_replicas(scores, topology), topology)
    values: list[float] = scores.tolist()
    return values


def score_alone(model: PolicyModel, topology: Topology, pair: Pair) -> tuple[float, Tensor]:
    """One pair in a row of its own, on all replicas alike.

    Returns:
        Its sequence log-prob, on every rank; and which positions of the sequence this rank's layers computed, int64, in
        the order of their hidden states. Those from the sequence's length on are padding.
    """
    prompt, response = pair
    length = row_length([pair], topology.row_length_multiple)
    row = pack_row([(prompt, [response])], length, _context(topology))
    assert row.layout is not None
    with torch.no_grad():
        outputs = _run([model], [row])
    score = torch.zeros(1, dtype=torch.float64, device=device())
    if topology.is_last_pipeline_stage:
        score.copy_(outputs[0].double())
    positions = row.layout.held
    if topology.sequence_parallel:
        positions = positions.chunk(topology.tp_size)[topology.tp_rank]
    return float(broadcast_from_last_pipeline_stage(score, topology)), positions


@dataclass(frozen=True)
class _SharedPrompt:
    """Neighbouring pairs with the same prompt, and their places in the list."""

    prompt: Sequence[int]
    responses: list[Sequence[int]]
    indices: list[int]

    @property
    def shape(self) -> Shape:
        return Shape(len(self.prompt), tuple(len(response) for response in self.responses))


def _shared(pairs: Sequence[Pair], row_tokens: int) -> list[_SharedPrompt]:
    """Groups of neighbours with one prompt, each as large as a row lets it."""
    found: list[_SharedPrompt] = []
    held = 0
    for index, (prompt, response) in enumerate(pairs):
        held += len(response) - 1
        if not found or held > row_tokens or list(found[-1].prompt) != list(prompt):
            found.append(_SharedPrompt(prompt, [], []))
            held = len(prompt) + len(response) - 1
        found[-1].responses.append(response)
        found[-1].indices.append(index)
    return found


def _portions(bundles: Sequence[_SharedPrompt], tokens: int) -> Iterator[list[_SharedPrompt]]:
    """Groups in order, about `tokens` at a time: as much as one run of the schedule takes."""
    portion: list[_SharedPrompt] = []
    held = 0
    for bundle in bundles:
        size = bundle.shape.row_tokens(True)
        if portion and held + size > tokens:
            yield portion
            portion, held = [], 0
        portion.append(bundle)
        held += size
    if portion:
        yield portion


def _context(topology: Topology) -> ContextShare:
    return ContextShare(topology.cp_rank, topology.cp_size, topology.cp_group)


def _run(chunks: list[PolicyModel], rows: list[Rows]) -> list[Tensor]:
    """The sequence log-probs of each row, on the last pipeline stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    outputs: list[Tensor] = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[iter(rows) for _ in chunks],
        model=chunks,
        num_microbatches=len(rows),
        seq_length=rows[0].row_length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return outputs


def _forward_step(data_iterator: Iterator[Rows], model: PolicyModel) -> tuple[Tensor, object]:
    return run_rows(next(data_iterator), model), _keep


def _keep(sequence_log_probs: Tensor, non_loss_data: bool) -> Tensor:
    """The loss function of a pass that has none."""
    return sequence_log_probs
