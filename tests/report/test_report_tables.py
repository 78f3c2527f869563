"""The table per iteration and its rendering in a terminal."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from megatron_tspin.report.run_data import load_run, weighted_mean
from megatron_tspin.report.tables import ABSENT, MEASURES, iteration_rows, measures_with_values, render_terminal

BuildRun = Callable[..., Path]


def test_rows_pair_an_iteration_with_the_policy_that_came_out(build_run: BuildRun) -> None:
    run = load_run(build_run(iterations=2))
    start, first, second = iteration_rows(run)
    assert start.iteration is None and start.evaluation is run.evaluations[0] and start.rollout is run.proto
    assert first.evaluation is run.evaluations[1] and second.evaluation is run.evaluations[2]
    assert first.rollout is run.iterations[0].synthetic


def test_policy_numbers_come_from_the_second_half_of_the_steps(build_run: BuildRun) -> None:
    run = load_run(build_run(iterations=1, steps=10))
    row = iteration_rows(run)[1]
    assert row.late["log_prob_annotated"] == weighted_mean(run.iterations[0].steps[5:], "log_prob_annotated")
    assert row.early["loss"] == weighted_mean(run.iterations[0].steps[:5], "loss")
    assert row.whole["tokens_per_second"] == weighted_mean(run.iterations[0].steps, "tokens_per_second")
    assert row.late["historical_advantage"] is not None
    assert row.historical_margin == pytest.approx(0.1 * row.late["historical_advantage"])


def test_an_unfinished_iteration_has_no_evaluation(build_run: BuildRun) -> None:
    rows = iteration_rows(load_run(build_run(iterations=3, done=1.5)))
    assert [row.evaluation is None for row in rows] == [False, False, True]


def test_lines_without_any_value_are_left_out(build_run: BuildRun) -> None:
    labels = {measure.label for measure in measures_with_values(iteration_rows(load_run(build_run(method="sft"))))}
    assert "loss" in labels and "log-prob of y' (synthetic)" not in labels and "historical advantage" not in labels


def precision_lines(folder: Path) -> dict[str, list[str]]:
    rows = iteration_rows(load_run(folder))
    return {
        m.label: [m.text(row) for row in rows] for m in measures_with_values(rows) if m.group.startswith("Precision")
    }


def test_precision_has_a_figure_an_iteration(build_run: BuildRun) -> None:
    folder = build_run(iterations=2, noise_share=0.03, drift_share=0.02, config={"precision.bf16": True})
    assert precision_lines(folder) == {
        "error of a log-prob (mean size, nats)": [ABSENT, "0.400", "0.400"],
        "its bias": [ABSENT, "−0.100", "−0.100"],
        "its largest size": [ABSENT, "1.600", "1.600"],
        "error of a token (RMS, nats)": [ABSENT, "0.0800", "0.0800"],
        "current margin: error / median": [ABSENT, "3.0\u00a0%", "3.0\u00a0%"],
        "historical margin: error / median": [ABSENT, ABSENT, "3.0\u00a0%"],
        "drift from generation (mean size)": [ABSENT, "0.400", "0.400"],
        "drift / median current margin": [ABSENT, "2.0\u00a0%", "2.0\u00a0%"],
    }


def test_another_engines_log_probs_have_a_figure(build_run: BuildRun) -> None:
    folder = build_run(iterations=2, noise_share=0.0, config={"generation.engine": "vllm"})
    lines = precision_lines(folder)
    assert lines["the engine's, of a token (RMS, against fp32)"] == [ABSENT, "0.0200", "0.0200"]


def test_precision_of_sft_has_no_margins_and_that_of_fp32_nothing(build_run: BuildRun) -> None:
    sft = build_run("sft", method="sft", noise_share=0.03, config={"precision.bf16": True})
    assert len(precision_lines(sft)) == 4
    assert precision_lines(build_run("fp32")) == {}


def test_accuracy_is_shown_with_its_standard_error(build_run: BuildRun) -> None:
    rows = iteration_rows(load_run(build_run()))
    sampled = next(measure for measure in MEASURES if measure.label == "accuracy (%), sampled")
    assert sampled.text(rows[0]) == "5.0\u00a0±\u00a02.0"
    no_scorer = iteration_rows(load_run(build_run("plain", scorer=False)))
    assert sampled.text(no_scorer[0]) == ABSENT


def test_low_active_shares_are_marked(build_run: BuildRun) -> None:
    active = next(measure for measure in MEASURES if measure.label == "active pairs")
    assert active.text(iteration_rows(load_run(build_run(active=0.1)))[1]).endswith("!")
    assert not active.text(iteration_rows(load_run(build_run("fine", active=0.5)))[1]).endswith("!")


def rendered(folder: Path, width: int) -> str:
    stream = io.StringIO()
    render_terminal(load_run(folder), Console(file=stream, width=width, color_system=None))
    return stream.getvalue()


def test_the_terminal_shows_the_table_and_the_warnings(build_run: BuildRun) -> None:
    text = rendered(build_run(active=0.1), width=120)
    assert "iter 3" in text and "log-prob of y0 (proto)" in text and "Warning: Saturation" in text


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_narrow_terminal_keeps_the_start_and_the_latest_iterations(build_run: BuildRun, width: int) -> None:
    many = [0.1 + 0.01 * number for number in range(13)]
    falling = [-60.0 + number for number in range(13)]
    folder = build_run(
        iterations=12,
        steps=2,
        accuracy=many,
        ended=[0.9] * 13,
        lengths=[30.0] * 13,
        annotated=falling,
        synthetic=falling,
    )
    text = rendered(folder, width)
    assert "start" in text and "iter 11" in text and "iter 2 " not in text
    assert all(len(line) <= width for line in text.splitlines())


def test_names_are_no_markup(build_run: BuildRun) -> None:
    assert "[red]run[bold] (tspin)" in rendered(build_run("[red]run[bold]"), width=100)
