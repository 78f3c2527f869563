"""From sums to the metrics of a step, as the metrics declare it."""

import json

import pytest

from megatron_tspin.objective.roles import ROLES
from megatron_tspin.step_metrics import QUOTIENTS, SUMMED, TEACHING, StepMetrics
from tests.step_metrics import MEASURED, SUMS, mean, metrics

DIAGNOSED = [f"{quantity}_{role}" for quantity in ("entropy", "top") for role in ROLES]
RATIOS = ["tokens", "places", "used", "prompt_tokens", "saved_prompt_tokens"]
FIELDS = [
    "iteration", "step", "loss", "learning_rate", "grad_norm", "update_skipped", "num_triplets",
    "log_prob_annotated", "log_prob_synthetic", "log_prob_proto",
    "reward_annotated", "reward_synthetic", "reward_proto",
    "tokens_annotated", "tokens_synthetic", "tokens_proto",
    "current_advantage", "historical_advantage", "current_margin", "active_share", "mean_slope", "identical_share",
    "tokens_per_second", "packing_efficiency", "prompt_share_saved",
    "entropy_annotated", "entropy_synthetic", "entropy_proto", "top_annotated", "top_synthetic", "top_proto", "seconds",
]  # fmt: skip


def test_a_line_has_the_fields_of_the_format_in_order() -> None:
    assert list(json.loads(metrics(3).line())) == FIELDS


def test_every_field_is_measured_or_comes_from_sums() -> None:
    assert StepMetrics.model_fields.keys() == {*MEASURED, *QUOTIENTS}


def test_means_over_triplets() -> None:
    found = StepMetrics.from_sums(SUMS, ROLES, MEASURED)
    names = [name for name in SUMMED if name not in ("num_triplets", TEACHING, *RATIOS, *DIAGNOSED)]
    assert {name: getattr(found, name) for name in names} == {name: mean(name) for name in names}
    assert found.num_triplets == 4
    assert found.tokens_per_second == SUMS["tokens"] / 2.0
    assert found.packing_efficiency == SUMS["used"] / SUMS["places"]
    assert found.prompt_share_saved == SUMS["saved_prompt_tokens"] / SUMS["prompt_tokens"]
    assert [getattr(found, name) for name in DIAGNOSED] == [None] * 6, "nothing was measured"
    assert {key: getattr(found, key) for key in MEASURED} == MEASURED


@pytest.mark.parametrize("roles", [ROLES, ROLES[:2], ROLES[:1]], ids=len)
def test_diagnostics_are_means_over_response_tokens(roles: tuple[str, ...]) -> None:
    found = StepMetrics.from_sums(SUMS, roles, MEASURED, diagnostics=True)
    for role in ROLES:
        for quantity in ("entropy", "top"):
            name = f"{quantity}_{role}"
            assert getattr(found, name) == (SUMS[name] / SUMS[f"tokens_{role}"] if role in roles else None)


@pytest.mark.parametrize(
    ("roles", "absent"),
    [
        (ROLES[:2], ["log_prob_proto", "reward_proto", "tokens_proto", "historical_advantage"]),
        (ROLES[:1], ["log_prob_synthetic", "tokens_proto", "current_advantage", "active_share", "identical_share"]),
    ],
)
def test_what_was_not_computed_is_none(roles: tuple[str, ...], absent: list[str]) -> None:
    found = StepMetrics.from_sums(SUMS, roles, MEASURED)
    assert [getattr(found, name) for name in absent] == [None] * len(absent)
    assert found.log_prob_annotated == mean("log_prob_annotated")
