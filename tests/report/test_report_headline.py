"""The sentence on top, the four numbers, and the comparison with other runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tspin.records import DecodingResult
from megatron_tspin.report.headline import compare_runs, differing_data, duration, headline, tiles
from megatron_tspin.report.run_data import load_run
from megatron_tspin.report.significance import cautious_error, compare_decoding

BuildRun = Callable[..., Path]


def said(folder: Path) -> str:
    return headline(load_run(folder)).replace("\u00a0", " ")


def result(accuracy: float | None, error: float | None, number: int = 100) -> DecodingResult:
    return DecodingResult(
        num_prompts=number, accuracy=accuracy, standard_error=error, ended_share=1.0, mean_tokens=10.0
    )


def test_a_clear_gain_is_called_one(build_run: BuildRun) -> None:
    assert said(build_run()) == (
        "After 4 iterations, the policy answers 38.0 ± 4.4 % of 120 held-out prompts correctly (sampled) against "
        "5.0 ± 2.0 % for the initial policy: a gain of 33.0 points, 6.8 standard errors and so more than chance."
    )


def test_a_clear_loss_is_called_one(build_run: BuildRun) -> None:
    assert "a loss of 40.0 points" in said(build_run(accuracy=[0.5, 0.4, 0.3, 0.2, 0.1]))


def test_noise_is_called_noise(build_run: BuildRun) -> None:
    sentence = said(build_run(accuracy=[0.3, 0.3, 0.3, 0.3, 0.34]))
    assert "+4.0 points, 0.7 standard errors, which is less than 2 and may be chance" in sentence


def test_an_unfinished_run_says_so(build_run: BuildRun) -> None:
    folder = build_run(iterations=4, done=2.5)
    assert said(folder).startswith("So far, after 2 of 4 iterations, ")


def test_before_the_first_iteration_and_before_anything(build_run: BuildRun) -> None:
    assert said(build_run(done=0.5)) == (
        "No iteration is evaluated yet; the initial policy answers 5.0 ± 2.0 % of 120 held-out prompts correctly "
        "(sampled)."
    )
    assert said(build_run("nothing", done=0)).startswith("Nothing is measured yet")


def test_without_a_scorer_the_likelihood_speaks_and_claims_no_error(build_run: BuildRun) -> None:
    sentence = said(build_run(scorer=False))
    assert "1.1290 nats per token against 1.9355" in sentence and "0.8065 lower" in sentence
    assert "no accuracy and no standard error was measured" in sentence


def test_none_right_before_does_not_make_any_gain_certain() -> None:
    difference = compare_decoding(result(0.0, 0.0), result(0.02, 0.014))
    assert difference is not None and not difference.is_clear
    assert cautious_error(result(0.0, 0.0)) == pytest.approx(0.01347, abs=1e-5)
    assert cautious_error(result(1.0, 0.0)) == pytest.approx(cautious_error(result(0.0, 0.0)))


def test_errors_add_in_quadrature_and_absent_accuracies_compare_to_nothing() -> None:
    difference = compare_decoding(result(0.2, 0.03), result(0.3, 0.04))
    assert difference is not None
    assert difference.standard_error == pytest.approx(0.05) and difference.in_errors == pytest.approx(2.0)
    assert not difference.is_clear
    assert compare_decoding(result(None, None), result(0.3, 0.04)) is None
    assert compare_decoding(None, result(0.3, 0.04)) is None


def test_tiles_show_before_and_after(build_run: BuildRun) -> None:
    found = {tile.label: tile for tile in tiles(load_run(build_run()))}
    assert list(found) == [
        "Accuracy (%), sampled",
        "Accuracy (%), greedy",
        "NLL per token of y",
        "Answers that end, sampled",
    ]
    assert found["NLL per token of y"].before == "1.935" and found["NLL per token of y"].verdict == "−0.806 nats"
    assert "Accuracy (%), sampled" not in {tile.label for tile in tiles(load_run(build_run("n", scorer=False)))}


def test_runs_are_compared_with_this_one(build_run: BuildRun) -> None:
    run = load_run(build_run())
    spin = load_run(build_run("spin", method="spin", accuracy=[0.05, 0.1, 0.06, 0.14, 0.09]))
    own, other = compare_runs(run, [spin])
    assert own.against == "this run" and own.objective == "tspin, alpha 0.1, beta 0.1, lr 0.0003"
    assert other.against == "−29.0 points (5.6\u00a0SE, clear)" and other.objective == "spin, lambda 0.1, lr 0.0003"


def test_other_held_out_examples_are_noticed(build_run: BuildRun) -> None:
    run, same = load_run(build_run()), load_run(build_run("same"))
    other = load_run(build_run("other", prompt="another prompt"))
    assert differing_data(run, [same, other]) == ["other"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (3599.6, "1 h 00 min"), (7300, "2 h 01 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds).replace("\u00a0", " ") == text
