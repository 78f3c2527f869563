"""What `loss_func` hands to megatron-core and to the metrics, with `teaching` as the judge of a step."""

from typing import Any

import pytest
import torch

from megatron_tspin.config import ObjectiveSection
from megatron_tspin.models.row_layout import ContextShare
from megatron_tspin.objective.batches import BatchPlanner, MicroBatch, Triplet
from megatron_tspin.objective.forward import loss_func
from megatron_tspin.objective.losses import ACTIVE_MARGIN
from megatron_tspin.objective.packing import Packing, WorkModel
from megatron_tspin.objective.roles import ROLES
from megatron_tspin.step_metrics import SUMMED

DIFFERENT = {"annotated": [3, 4], "synthetic": [5], "proto": [6, 7, 8]}
IDENTICAL = {"annotated": [3, 4], "synthetic": [3, 4], "proto": [6, 7, 8]}
ALL_ALIKE = {"annotated": [3, 4], "synthetic": [3, 4], "proto": [3, 4]}
STALLED = {"annotated": [3, 4], "synthetic": [9], "proto": [9]}


WORK = WorkModel(1.0, 1.0, 1.0)
PACKED = Packing(capacity=64, multiple=8)


def micro_batch(responses: list[dict[str, list[int]]], roles: tuple[str, ...], **facts: Any) -> MicroBatch:
    triplets = [
        Triplet(str(i), [1, 2], {role: each[role] for role in roles}, **facts) for i, each in enumerate(responses)
    ]
    return BatchPlanner(None, WORK, roles, len(triplets)).plan(triplets)[0]


def sums_of(objective: ObjectiveSection, beta: float, batch: MicroBatch, rows: list[list[float]]) -> dict[str, float]:
    return dict(zip(SUMMED, loss_func(batch, objective, beta, torch.tensor(rows).flatten())[2].tolist(), strict=True))


def test_sums() -> None:
    objective, log_probs = ObjectiveSection(alpha=0.5), [[-3.0, -5.0, -4.0], [-2.0, -16.0, -8.0]]
    batch = micro_batch([DIFFERENT, STALLED], ROLES)
    flat = torch.tensor(log_probs).flatten().requires_grad_()
    loss, count, sums = loss_func(batch, objective, 0.1, flat)
    found = dict(zip(SUMMED, sums.tolist(), strict=True))
    u, v = torch.tensor([1.0, 7.0]), torch.tensor([-0.5, -4.0])
    expected_loss = (torch.nn.functional.softplus(-u) + 0.1 * torch.nn.functional.softplus(-v)).sum().item()
    assert loss.item() == pytest.approx(expected_loss) and loss.requires_grad
    assert count.item() == 2 and count.dtype == torch.int
    assert sums.dtype == torch.float64 and not sums.requires_grad
    assert found == pytest.approx(
        {
            "num_triplets": 2,
            "loss": expected_loss,
            "log_prob_annotated": -5.0,
            "log_prob_synthetic": -21.0,
            "log_prob_proto": -12.0,
            "reward_annotated": -2.5,
            "reward_synthetic": -10.5,
            "reward_proto": -6.0,
            "tokens_annotated": 4,
            "tokens_synthetic": 2,
            "tokens_proto": 4,
            "current_advantage": 16.0,
            "historical_advantage": -9.0,
            "current_margin": 8.0,
            "active_share": 1,
            "mean_slope": torch.sigmoid(-u).sum().item(),
            "identical_share": 0,
            "teaching": 1,
            "tokens": 2 * 6 + 4 + 2 + 4,
            "places": 6 * 8,
            "used": 2 * 6 + 4 + 2 + 4 - 6,
            "prompt_tokens": 12,
            "saved_prompt_tokens": 0,
            **{f"{quantity}_{role}": 0 for quantity in ("entropy", "top") for role in ROLES},
        }
    )


def test_every_sum_is_computed() -> None:
    """A sum that nothing is added to would be a metric of 0."""
    triplets = [Triplet("a", [1, 2], DIFFERENT), Triplet("b", [1, 2], IDENTICAL)]
    [batch] = planner(PACKED, diagnostics=True).plan(triplets)
    output = torch.linspace(-9.0, -4.0, 18).view(3, 6)
    sums = loss_func(batch, ObjectiveSection(alpha=1.0), 0.1, output)[2].tolist()
    assert [name for name, value in zip(SUMMED, sums, strict=True) if value == 0] == []


def test_sums_of_a_method_with_a_reference() -> None:
    reference = {"annotated": -1.0, "synthetic": -2.0}
    batch = micro_batch([DIFFERENT], ROLES[:2], reference=reference)
    found = sums_of(ObjectiveSection(method="spin", spin_lambda=0.25), 0.0, batch, [[-3.0, -8.0]])
    assert found["reward_annotated"] == -0.5 and found["reward_synthetic"] == -1.5
    assert found["current_advantage"] == 4.0 and found["current_margin"] == 1.0
    assert found["log_prob_proto"] == found["reward_proto"] == found["historical_advantage"] == 0.0


def test_sums_of_sft() -> None:
    found = sums_of(ObjectiveSection(method="sft"), 0.0, micro_batch([DIFFERENT] * 2, ROLES[:1]), [[-3.0], [-4.0]])
    assert found["loss"] == 7.0 and found["teaching"] == 2 and found["tokens_annotated"] == 4
    assert found["current_margin"] == found["active_share"] == found["identical_share"] == 0


ACTIVE, SATURATED = [-3.0, -5.0, -7.0], [-3.0, -30.0, -90.0]
ONLY_HISTORICAL = [-3.0, -30.0, -30.0]


@pytest.mark.parametrize(
    ("responses", "beta", "log_probs", "teaching"),
    [
        (DIFFERENT, 0.0, ACTIVE, 1),
        (IDENTICAL, 0.0, [-3.0, -3.0, -5.0], 0),
        (DIFFERENT, 0.0, SATURATED, 0),
        (DIFFERENT, 0.1, SATURATED, 0),
        (DIFFERENT, 0.1, ONLY_HISTORICAL, 1),
        (DIFFERENT, 0.0, ONLY_HISTORICAL, 0),
        (IDENTICAL, 0.1, [-3.0, -3.0, -5.0], 1),
        (IDENTICAL, 0.1, [-3.0, -3.0, -50.0], 0),
        (ALL_ALIKE, 0.1, [-3.0, -3.0, -3.0], 0),
        (STALLED, 0.1, ONLY_HISTORICAL, 0),
        (DIFFERENT, 0.0, [-3.0, 2.0 - ACTIVE_MARGIN - 5.0, 0.0], 1),  # exactly at the limit
    ],
)
def test_what_teaches(responses: dict[str, list[int]], beta: float, log_probs: list[float], teaching: int) -> None:
    roles = ROLES if beta else ROLES[:2]
    found = sums_of(ObjectiveSection(alpha=1.0), beta, micro_batch([responses], roles), [log_probs[: len(roles)]])
    assert found["teaching"] == teaching


@pytest.mark.parametrize(("responses", "log_probs"), [(IDENTICAL, [-3.0, -3.0]), (DIFFERENT, SATURATED[:2])])
def test_what_does_not_teach_has_next_to_no_gradient(responses: Any, log_probs: list[float]) -> None:
    flat = torch.tensor(log_probs, requires_grad=True)
    loss_func(micro_batch([responses], ROLES[:2]), ObjectiveSection(alpha=1.0), 0.0, flat)[0].backward()
    assert flat.grad is not None
    # An identical pair has opposite gradients at the same log-prob, which cancel in the policy.
    assert abs(flat.grad.sum().item()) < 1e-6
    assert responses is IDENTICAL or flat.grad.abs().max() < 0.007


def test_an_nll_term_always_teaches() -> None:
    batch = micro_batch([IDENTICAL], ROLES[:2])
    assert sums_of(ObjectiveSection(nll_weight=0.1), 0.0, batch, [[-3.0, -3.0]])["teaching"] == 1


def test_a_divergent_log_prob_reaches_the_sums() -> None:
    found = sums_of(ObjectiveSection(), 0.0, micro_batch([DIFFERENT], ROLES[:2]), [[float("nan"), -1.0]])
    assert found["loss"] != found["loss"] and found["teaching"] == 0


def planner(packing: Packing | None, **facts: Any) -> BatchPlanner:
    return BatchPlanner(packing, WORK, ROLES, 2, **facts)


@pytest.mark.parametrize("diagnostics", [False, True])
@pytest.mark.parametrize("packing", [None, PACKED], ids=["padded", "packed"])
def test_an_empty_micro_batch_adds_nothing(packing: Packing | None, diagnostics: bool) -> None:
    """A replica that has a row but no triplet takes part in the schedule all the same."""
    triplet = Triplet("a", [1], {role: [2] for role in ROLES})
    plans = [planner(packing, replica=r, replicas=2, diagnostics=diagnostics).plan([triplet]) for r in range(2)]
    [batch] = next(plan for plan in plans if not plan[0].num_triplets)
    output = torch.zeros((3, 0) if diagnostics else 0, requires_grad=True)
    loss, count, sums = loss_func(batch, ObjectiveSection(), 0.1, output)
    assert loss.item() == 0 and count.item() == 0 and loss.requires_grad
    found = dict(zip(SUMMED, sums.tolist(), strict=True))
    assert found.pop("places") == batch.rows.places and not any(found.values())


def test_sums_of_a_packed_row() -> None:
    triplets = [Triplet("a", [1, 2], DIFFERENT), Triplet("b", [1, 2, 3], STALLED)]
    [batch] = planner(PACKED).plan(triplets)
    found = sums_of(ObjectiveSection(), 0.1, batch, [[-3.0, -5.0, -4.0], [-2.0, -16.0, -8.0]])
    assert (found["tokens"], found["places"], found["used"]) == (3 * 5 + 6 + 4, 16, (2 + 1 + 2) + (3 + 1))
    assert (found["prompt_tokens"], found["saved_prompt_tokens"]) == (3 * 5, 2 * 5)


@pytest.mark.parametrize("packing", [None, PACKED], ids=["padded", "packed"])
def test_diagnostics_are_summed_by_role_and_move_nothing(packing: Packing | None) -> None:
    triplets = [Triplet("a", [1, 2], DIFFERENT), Triplet("b", [1, 2], STALLED)]
    log_probs, entropy, top = (
        [-3.0, -5.0, -4.0, -2.0, -6.0, -8.0],
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        [2.0, 0, 1.0, 0, 0, 1.0],
    )
    outputs = {
        False: torch.tensor(log_probs, requires_grad=True),
        True: torch.tensor([log_probs, entropy, top], requires_grad=True),
    }
    sums = {}
    for diagnostics, output in outputs.items():
        [batch] = planner(packing, diagnostics=diagnostics).plan(triplets)
        loss, _, values = loss_func(batch, ObjectiveSection(), 0.1, output)
        loss.backward()
        sums[diagnostics] = dict(zip(SUMMED, values.tolist(), strict=True))
    measured = {"entropy": (5.0, 7.0, 9.0), "top": (2.0, 0.0, 2.0)}
    expected = {f"{name}_{role}": value for name in measured for role, value in zip(ROLES, measured[name], strict=True)}
    assert sums[True] == sums[False] | expected
    assert outputs[True].grad is not None and outputs[False].grad is not None
    assert outputs[True].grad[0].equal(outputs[False].grad) and not outputs[True].grad[1:].any()


def test_the_first_of_the_ranks_that_share_a_row_counts_its_triplets() -> None:
    """All of them have the whole loss; megatron-core sums the counts over CP as well."""
    triplet = Triplet("a", [1, 2], DIFFERENT)
    found = []
    for rank in range(2):
        [batch] = planner(PACKED, context=ContextShare(rank, 2)).plan([triplet])
        loss, count, sums = loss_func(batch, ObjectiveSection(), 0.1, torch.tensor([-3.0, -5.0, -4.0]))
        found.append((loss.item(), sums.tolist(), count.item()))
    assert found[0][:2] == found[1][:2] and [count for _, _, count in found] == [1, 0]
