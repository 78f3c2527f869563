"""The reduced form of every check gives its figures on a CPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tspin.benchmark.gpu_report.catalogue import BY_NAME
from megatron_tspin.benchmark.gpu_report.check import FAILED, OK, Outcome

pytestmark = pytest.mark.processes

HERE = Path(__file__).resolve().parent
IN_ONE_PROCESS = ("te", "parity", "attention", "head", "step", "generation")
NOT_ON_THIS_CPU = "only supports per-tensor scaling for CPU"
"""torch 2.11 of its FP8 products."""
NO_ENGINE = "Transformer Engine is not installed"

Outcomes = dict[str, dict[str, Outcome]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checks have run."""
    made = tmp_path_factory.mktemp("checks")
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "reduced_checks.py"), str(made), *IN_ONE_PROCESS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Outcomes:
    """By check and case."""
    found: Outcomes = {}
    for name in IN_ONE_PROCESS:
        written = json.loads((folder / f"{name}.json").read_text())
        cases = [Outcome(**outcome) for outcome in written["outcomes"]]
        assert [case.name for case in cases] == written["cases"]
        found[name] = {case.name: case for case in cases}
    return found


@pytest.mark.parametrize("name", IN_ONE_PROCESS)
def test_every_case_gives_figures_or_says_what_is_missing(outcomes: Outcomes, name: str) -> None:
    for case in outcomes[name].values():
        if case.status == FAILED:
            assert case.reason is not None and NOT_ON_THIS_CPU in case.reason, f"{case.name}: {case.reason}"
        elif case.status == OK:
            assert set(case.figures) & {*BY_NAME[name].columns, "shape"}, case.name
            assert all(math.isfinite(value) for value in case.figures.values() if isinstance(value, float)), case.name
        else:
            assert case.reason == NO_ENGINE and case.name.partition(" | ")[0].strip(), case.name


def test_log_probs_differ_as_the_formats_do(outcomes: Outcomes) -> None:
    exact, rounded = (outcomes["parity"][f"{name} | tiny"].figures for name in ("fp32", "bf16"))
    assert exact["responses"] == 6 and exact["tokens"] > 6 * 50
    assert float(exact["max"]) < 1e-4 < float(rounded["max"]) < 1
    assert float(rounded["t_max"]) < 0.1 * float(rounded["spread"]) < 0.1
    for figures in (exact, rounded):
        assert 0 < float(figures["std"]) <= float(figures["max"]) and float(figures["p95"]) <= float(figures["max"])


def test_gradients_differ_as_the_formats_do(outcomes: Outcomes) -> None:
    errors = {
        name: {key: float(value) for key, value in case.figures.items()}
        for name, case in outcomes["te"].items()
        if case.status == OK
    }
    rounded = errors["policy of 2 layers, bf16"]
    assert 1e-6 < rounded["out"] < 1e-3 and 1e-4 < rounded["weight_gradient"] < 3e-2
    scaled = errors["policy of 2 layers, FP8 torch tensorwise hybrid"]
    assert rounded["out"] < scaled["out"] and rounded["weight_gradient"] < scaled["weight_gradient"] < 0.3


def test_backends_of_attention_agree(outcomes: Outcomes) -> None:
    errors = {name: case.figures for name, case in outcomes["attention"].items() if case.status == OK}
    errors = {name: figures for name, figures in errors.items() if "out" in figures}
    assert len(errors) == 6
    for name, figures in errors.items():
        largest = max(float(figures[part]) for part in ("out", "dq", "dk", "dv"))
        assert 0 < largest < (1e-5 if "fp32" in name else 2e-2), name
    for name in ("time segments, prompts shared", "time dense, prompts shared", "time SDPA flash, padded rows"):
        figures = outcomes["attention"][name].figures
        assert float(figures["low"]) <= float(figures["milliseconds"]) <= float(figures["high"])


def test_heads_agree(outcomes: Outcomes) -> None:
    sums = [float(case.figures["log_prob"]) for case in outcomes["head"].values()]
    assert len(sums) == 3 and sums[0] < -100 * math.log(1024) * 0.9
    assert sums == pytest.approx([sums[0]] * len(sums), rel=1e-4)


def test_speeds_follow_from_times(outcomes: Outcomes) -> None:
    assert outcomes["step"]["model"].figures["layers"] == 2
    for case in outcomes["step"].values():
        if "milliseconds" in case.figures:
            seconds = float(case.figures["milliseconds"]) / 1e3
            assert float(case.figures["triplets_per_second"]) * seconds == pytest.approx(2)
            assert float(case.figures["tflops"]) > 0 and float(case.figures["peak_gib"]) > 0
    made = [case.figures for case in outcomes["generation"].values()]
    for figures in made:
        assert float(figures["tokens_per_second"]) * float(figures["milliseconds"]) / 1e3 == pytest.approx(8)


def test_a_step_multiplies_as_often_as_the_work_model_says(folder: Path) -> None:
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["counted"] == facts["predicted"] > 1e6
    assert facts["by_step"] == pytest.approx(facts["by_planner"], rel=1e-12)


def test_policies_do_not_outlive_their_case(folder: Path) -> None:
    """On a GPU the next one would find no memory."""
    assert json.loads((folder / "facts.json").read_text())["policies_left"] == 0
