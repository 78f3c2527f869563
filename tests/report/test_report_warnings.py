"""Each trap is found where it is, with its numbers, and nowhere else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.report.run_data import load_run
from megatron_tspin.report.warnings import Warning_, find_warnings

BuildRun = Callable[..., Path]
NBSP = "\u00a0"


def warnings_of(build_run: BuildRun, **changes: Any) -> dict[str, Warning_]:
    return {warning.kind: warning for warning in find_warnings(load_run(build_run(**changes)))}


def test_a_healthy_run_warns_of_nothing(build_run: BuildRun) -> None:
    assert warnings_of(build_run) == {}


def test_an_empty_run_warns_of_nothing(build_run: BuildRun) -> None:
    assert warnings_of(build_run, done=0) == {}


@pytest.mark.parametrize("method", ["spin", "tspin_ref", "sft"])
def test_other_methods_are_judged_without_errors(build_run: BuildRun, method: str) -> None:
    assert "saturation" not in warnings_of(build_run, method=method)


def test_saturation_names_share_iterations_and_the_scale_to_lower(build_run: BuildRun) -> None:
    found = warnings_of(build_run, active=0.10, iterations=2)["saturation"]
    assert "iteration 0: 1" in found.measured and "iteration 1:" in found.measured
    assert "`objective.alpha`" in found.remedy
    assert "`objective.spin_lambda`" in warnings_of(build_run, name="s", method="spin", active=0.1)["saturation"].remedy


def test_saturation_starts_below_twenty_percent(build_run: BuildRun) -> None:
    assert "saturation" not in warnings_of(build_run, active=0.27)


def test_runaway_two_drops_of_the_held_out_log_prob_while_the_loss_falls(build_run: BuildRun) -> None:
    sinking = [-40.0, -42.0, -45.0, -45.0, -45.0]
    found = warnings_of(build_run, annotated=sinking, synthetic_fall=40.0)["runaway"]
    assert "−40.0 → −42.0 → −45.0 over iterations 0 and 1, while the loss fell in both" in found.measured


def test_one_drop_is_no_runaway(build_run: BuildRun) -> None:
    found = warnings_of(build_run, annotated=[-40.0, -42.0, -41.0, -42.0, -41.0], synthetic_fall=40.0)
    assert "runaway" not in found


def test_drops_with_a_rising_loss_are_no_runaway(build_run: BuildRun) -> None:
    sinking = [-40.0, -50.0, -60.0, -70.0, -80.0]
    assert "runaway" not in warnings_of(build_run, annotated=sinking, synthetic_fall=-20.0)


def test_runaway_is_found_in_training_when_nothing_is_held_out(build_run: BuildRun) -> None:
    folder = build_run(annotated=[-40.0, -42.0, -45.0, -49.0, -53.0], synthetic_fall=40.0)
    for path in (folder / "evaluation").glob("*.json"):
        path.unlink()
    found = {warning.kind: warning for warning in find_warnings(load_run(folder))}["runaway"]
    assert "log-prob of y in training" in found.measured


def test_runaway_by_answers_that_stop_ending(build_run: BuildRun) -> None:
    found = warnings_of(build_run, ended=[0.9, 0.9, 0.75, 0.75, 0.75])["runaway"]
    assert f"90{NBSP}% → 75{NBSP}% (of 256) over iteration 1" in found.measured
    assert "runaway" not in warnings_of(build_run, name="less", ended=[0.9, 0.9, 0.82, 0.82, 0.82])


def test_the_last_policy_is_judged_on_held_out_prompts(build_run: BuildRun) -> None:
    found = warnings_of(build_run, iterations=2, ended=[0.9, 0.9, 0.7])["runaway"]
    assert "(of 120) over iteration 1" in found.measured


def test_displacement_needs_both_sinking_and_a_growing_margin(build_run: BuildRun) -> None:
    sinking = [-40.0, -45.0, -45.0, -45.0, -45.0]
    found = warnings_of(build_run, annotated=sinking, synthetic_fall=40.0)["displacement"]
    assert "iteration 0: log-prob of y −40.0 → −45.0, of y' " in found.measured
    assert "iteration 1" not in found.measured
    assert "nll_weight" in found.remedy and "not part of the paper" in found.remedy
    assert "displacement" not in warnings_of(build_run, name="up", synthetic_fall=40.0)
    assert "displacement" not in warnings_of(build_run, name="margin", annotated=sinking, synthetic_fall=-3.0)


def test_a_clearly_better_earlier_policy_is_named(build_run: BuildRun) -> None:
    found = warnings_of(build_run, accuracy=[0.05, 0.4, 0.3, 0.2, 0.1])["better_before"]
    assert f"40.0{NBSP}% after 1 iterations, 10.0{NBSP}% after 4" in found.measured
    assert "`iteration_000/checkpoint`" in found.remedy
    assert "better_before" not in warnings_of(build_run, name="noise", accuracy=[0.05, 0.4, 0.35, 0.35, 0.36])


def test_answers_that_never_end(build_run: BuildRun) -> None:
    found = warnings_of(build_run, ended=[0.31, 0.6, 0.6, 0.6, 0.6])["never_ending"]
    assert f"y' of iteration 0: 31{NBSP}% of 256" in found.measured and "iteration 1" not in found.measured
    assert "y0: 31" in found.measured and "256 new tokens" in found.measured


def test_answers_that_go_on_after_their_end(build_run: BuildRun) -> None:
    endless = [0.1, 0.6, 0.6, 0.6, 0.6]
    found = warnings_of(build_run, ended=endless, passed_over="<|im_end|>")["never_ending"]
    assert "most of the others hold '<|im_end|>' and go on after it" in found.measured
    assert "`data.closing_token: '<|im_end|>'`" in found.remedy


def test_identical_answers(build_run: BuildRun) -> None:
    assert f"72{NBSP}% of the y'" in warnings_of(build_run, identical=0.72)["identical"].measured
    assert "identical" not in warnings_of(build_run, name="few", identical=0.5)


def test_length_drift_in_both_directions(build_run: BuildRun) -> None:
    shrinking = warnings_of(build_run, lengths=[40.0, 30.0, 19.0, 19.0, 19.0])["length_drift"]
    assert "40.0 tokens from the first policy; iteration 2: 19.0" in shrinking.measured
    assert "length_drift" in warnings_of(build_run, name="long", lengths=[40.0, 30.0, 81.0, 81.0, 81.0])
    assert "length_drift" not in warnings_of(build_run, name="twice", lengths=[40.0, 80.0, 20.0, 40.0, 40.0])


def test_empty_answers(build_run: BuildRun) -> None:
    assert f"3.0{NBSP}% of 256" in warnings_of(build_run, empty=0.03)["empty_responses"].measured


BF16 = {"precision.bf16": True}


def test_noisy_margins_are_found_above_the_configured_share(build_run: BuildRun) -> None:
    found = warnings_of(build_run, iterations=2, noise_share=0.3, config=BF16)["noisy_margins"]
    assert f"iteration 0: current margins off by 0.6 on average, 30.0{NBSP}% of the median 2;" in found.measured
    assert "iteration 1: historical margins off by 0.6" in found.measured
    assert f"the limit here is 10.0{NBSP}%" in found.measured
    assert "`--bf16`" in found.remedy and "FP8" not in found.remedy


@pytest.mark.parametrize(
    ("noise_share", "drift_share", "config", "expected"),
    [
        (0.1, 0.1, {}, set()),
        (0.101, 0.1, {}, {"noisy_margins"}),
        (0.1, 0.101, {}, {"drifting"}),
        (0.3, 0.3, {"precision.noise_warning": 0.3}, set()),
        (0.3, 0.4, {"precision.noise_warning": 0.2}, {"noisy_margins", "drifting"}),
        (None, 0.5, {}, set()),
    ],
)
def test_noise_up_to_the_limit_is_no_warning(
    noise_share: float | None, drift_share: float, config: dict[str, Any], expected: set[str], build_run: BuildRun
) -> None:
    found = warnings_of(build_run, noise_share=noise_share, drift_share=drift_share, config={**BF16, **config})
    assert set(found) == expected


def test_noise_of_fp8_has_fp8_remedies(build_run: BuildRun) -> None:
    fp8 = {**BF16, "precision.fp8": "hybrid"}
    found = warnings_of(build_run, noise_share=0.3, drift_share=0.4, config=fp8)
    for kind in ("noisy_margins", "drifting"):
        for flag in ("--num-layers-at-start-in-bf16", "--num-layers-at-end-in-bf16", "--fp8-recipe", "--fp8-format"):
            assert flag in found[kind].remedy
    assert f"8 nats on average (bias −2), scaled 40.0{NBSP}% of the median margin" in found["drifting"].measured


@pytest.mark.parametrize("method", ["spin", "tspin_ref", "sft"])
def test_noise_of_other_methods_is_judged_without_errors(build_run: BuildRun, method: str) -> None:
    found = warnings_of(build_run, method=method, noise_share=0.3, drift_share=0.4, config=BF16)
    assert ({"noisy_margins", "drifting"} <= set(found)) == (method != "sft")
    assert method == "sft" or "reference log-probs left out" in found["noisy_margins"].measured


def test_every_warning_says_what_it_means_and_what_to_try(build_run: BuildRun) -> None:
    found = warnings_of(
        build_run, active=0.1, identical=0.6, empty=0.1, ended=[0.45, 0.2, 0.1, 0.1, 0.1], lengths=[90, 40, 40, 40, 40],
        noise_share=0.5, drift_share=0.5, config=BF16,
    )  # fmt: skip
    assert {"saturation", "identical", "empty_responses", "never_ending", "runaway", "length_drift"} <= set(found)
    assert {"noisy_margins", "drifting"} <= set(found)
    for warning in found.values():
        assert warning.measured.endswith(".") and warning.meaning.endswith(".") and warning.remedy.endswith(".")
