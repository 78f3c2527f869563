"""The gradient of each objective with respect to the role log-probs is Theorem 1's, written out by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tspin.config import ObjectiveSection
from megatron_tspin.objective.losses import link_loss, triplet_losses
from megatron_tspin.objective.roles import ROLES, computed_roles, has_reference, stored_roles

LOG_PROBS = {"annotated": [-3.0, -40.0, -7.5], "synthetic": [-5.0, -38.0, -7.5], "proto": [-4.0, -45.0, -7.0]}
REFERENCE = {"annotated": [-4.0, -41.0, -6.0], "synthetic": [-4.5, -36.0, -8.0], "proto": [-4.25, -44.0, -9.0]}
TOKENS = [2.0, 11.0, 5.0]


def slope(link: str, x: float) -> float:
    """l'(x)."""
    return -math.exp(-x) if link == "exponential" else -1.0 / (1.0 + math.exp(x))


def value(link: str, x: float) -> float:
    """l(x)."""
    return math.exp(-x) if link == "exponential" else math.log1p(math.exp(-x))


def by_hand(objective: ObjectiveSection, beta: float, i: int) -> tuple[float, dict[str, float]]:
    """Loss and gradient of one triplet."""
    y, y1, y0 = (LOG_PROBS[role][i] for role in ROLES)
    if objective.method in ("spin", "tspin_ref"):
        t, t1, t0 = (REFERENCE[role][i] for role in ROLES)
        y, y1, y0 = y - t, y1 - t1, y0 - t0
    if objective.method == "sft":
        return -y, {"annotated": -1.0, "synthetic": 0.0, "proto": 0.0}
    scale = objective.spin_lambda if objective.method == "spin" else objective.alpha
    beta = 0.0 if objective.method == "spin" else beta
    u, v = scale * (y - y1), scale * (y1 - y0)
    current, historical = scale * slope(objective.link, u), beta * scale * slope(objective.link, v)
    loss = value(objective.link, u) + beta * value(objective.link, v)
    nll = objective.nll_weight / TOKENS[i]
    return loss - nll * LOG_PROBS["annotated"][i], {
        "annotated": current - nll,
        "synthetic": -current + historical,
        "proto": -historical,
    }


CASES = [
    {"method": "tspin", "alpha": 0.7},
    {"method": "tspin", "alpha": 0.3, "link": "exponential"},
    {"method": "spin", "spin_lambda": 0.4},
    {"method": "spin", "spin_lambda": 0.4, "link": "exponential"},
    {"method": "tspin_ref", "alpha": 0.6},
    {"method": "tspin_ref", "alpha": 0.6, "link": "exponential"},
    {"method": "tspin", "alpha": 0.7, "nll_weight": 0.5},
    {"method": "sft"},
]


@pytest.mark.parametrize("beta", [0.0, 0.25])
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_theorem_1(settings: dict[str, Any], beta: float) -> None:
    objective = ObjectiveSection(**settings)
    roles = computed_roles(objective.method, beta)
    log_probs = {role: torch.tensor(LOG_PROBS[role], dtype=torch.float64, requires_grad=True) for role in roles}
    reference = None
    if has_reference(objective.method):
        reference = {role: torch.tensor(REFERENCE[role], dtype=torch.float64) for role in roles}
    losses = triplet_losses(objective, beta, log_probs, reference, torch.tensor(TOKENS, dtype=torch.float64))
    losses.loss.sum().backward()
    for i in range(3):
        loss, gradient = by_hand(objective, beta, i)
        assert losses.loss[i].item() == pytest.approx(loss, rel=1e-12)
        for role in ROLES:
            found = log_probs[role].grad[i].item() if role in roles else 0.0  # type: ignore[index]
            assert found == pytest.approx(gradient[role], rel=1e-12, abs=1e-15), role


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_gradients_are_those_of_the_values(settings: dict[str, Any]) -> None:
    objective = ObjectiveSection(**settings)
    reference = {role: torch.tensor(REFERENCE[role], dtype=torch.float64) for role in ROLES}

    def loss(*values: torch.Tensor) -> torch.Tensor:
        log_probs = dict(zip(ROLES, values, strict=True))
        tokens = torch.tensor(TOKENS, dtype=torch.float64)
        used = reference if has_reference(objective.method) else None
        return triplet_losses(objective, 0.25, log_probs, used, tokens).loss

    points = [torch.tensor(LOG_PROBS[role], dtype=torch.float64, requires_grad=True) for role in ROLES]
    assert torch.autograd.gradcheck(loss, points)


@given(margin=st.floats(-1e4, 1e4))
def test_the_logistic_link_never_overflows(margin: float) -> None:
    x = torch.tensor(margin, requires_grad=True)
    loss = link_loss(x, "logistic")
    loss.backward()
    assert math.isfinite(loss.item())
    assert x.grad is not None and -1.0 <= x.grad.item() <= 0.0
    assert loss.item() == pytest.approx(max(-margin, 0.0), abs=math.log(2) + 1e-6)


@pytest.mark.parametrize("link", ["logistic", "exponential"])
@given(low=st.floats(-20, 20), high=st.floats(-20, 20))
def test_links_decrease(link: str, low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    assert link_loss(torch.tensor(low), link) >= link_loss(torch.tensor(high), link) >= 0


@given(shift=st.floats(-50, 50), alpha=st.floats(0.05, 2))
def test_a_reference_that_is_the_same_for_all_roles_changes_nothing(shift: float, alpha: float) -> None:
    log_probs = {role: torch.tensor(LOG_PROBS[role], dtype=torch.float64) for role in ROLES}
    same = {role: torch.full((3,), shift, dtype=torch.float64) for role in ROLES}
    tokens = torch.tensor(TOKENS)
    plain = triplet_losses(ObjectiveSection(method="tspin", alpha=alpha), 0.1, log_probs, None, tokens)
    with_reference = triplet_losses(ObjectiveSection(method="tspin_ref", alpha=alpha), 0.1, log_probs, same, tokens)
    assert torch.allclose(plain.loss, with_reference.loss, rtol=1e-9, atol=1e-12)


def test_rewards_and_margins() -> None:
    log_probs = {role: torch.tensor(LOG_PROBS[role]) for role in ROLES}
    losses = triplet_losses(ObjectiveSection(alpha=0.5), 0.1, log_probs, None, torch.tensor(TOKENS))
    assert losses.rewards["annotated"].tolist() == [-1.5, -20.0, -3.75]
    assert losses.current_margin is not None and losses.current_margin.tolist() == [1.0, -1.0, 0.0]
    assert losses.historical_margin is not None and losses.historical_margin.tolist() == [-0.5, 3.5, -0.25]


def test_only_roles_with_weight_are_computed() -> None:
    assert computed_roles("sft", 0.1) == ("annotated",)
    assert computed_roles("spin", 0.1) == computed_roles("tspin", 0.0) == ("annotated", "synthetic")
    assert computed_roles("tspin", 0.1) == computed_roles("tspin_ref", 0.1) == ("annotated", "synthetic", "proto")
    assert stored_roles("tspin") == stored_roles("tspin_ref") == ROLES
    assert stored_roles("spin") == ROLES[:2] and stored_roles("sft") == ROLES[:1]
    assert [has_reference(method) for method in ("tspin", "spin", "tspin_ref", "sft")] == [False, True, True, False]
