"""The report survives whatever a check does, and says it."""

import importlib
import json
import math
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import pytest

from megatron_tspin.benchmark.gpu_report import report, runner
from megatron_tspin.benchmark.gpu_report.catalogue import BY_NAME, CHECKS
from megatron_tspin.benchmark.gpu_report.check import (
    FAILED,
    OK,
    SKIPPED,
    Check,
    CheckResult,
    Meaning,
    Outcome,
    status_of,
)
from megatron_tspin.benchmark.gpu_report.gpu_tests import closing_line, failed_tests
from megatron_tspin.benchmark.gpu_report.runner import CheckRun
from megatron_tspin.benchmark.gpu_report.table import render
from megatron_tspin.benchmark.tables import WIDTH
from megatron_tspin.cli.main import main
from megatron_tspin.errors import EXIT_INPUT, InputError
from tests.benchmark import fake_check
from tests.benchmark.reduced_checks import Told

TEXTS = ("versions", "model")  # cases whose figures are none of the table's columns
FAKE = Check("fake", "a check", limit=40, case_limit=1.5, columns=("value",))


def run(folder: Path, module: str = "tests.benchmark.fake_check", limit: float = 40.0, **more: Any) -> CheckResult:
    return CheckRun(FAKE, folder, reduced=False, limit=limit, module=module, **more).run()


@pytest.mark.processes
def test_no_case_stops_another(tmp_path: Path) -> None:
    seen: list[int] = []
    result = run(tmp_path, on_progress=lambda so_far: seen.append(len(so_far.cases)))
    found = {case.name: case for case in result.cases}
    assert list(found) == ["first", "raises", "absent", "hangs", "dies", "last"]
    assert [case.status for case in result.cases] == [OK, FAILED, SKIPPED, FAILED, FAILED, OK]
    assert found["first"].figures == {"value": 1.0} and found["last"].figures == {"value": 2.0, "word": "full"}
    assert found["raises"].reason is not None and found["raises"].reason.startswith("ValueError: not like this x")
    assert len(found["raises"].reason) == 600
    assert found["absent"].reason == "nothing to measure with"
    assert found["hangs"].reason == "not done within a case's limit of 2 s" and found["hangs"].seconds >= 1.5
    assert found["dies"].reason is not None and "died (SIGSEGV)" in found["dies"].reason
    assert all(not case.figures for case in result.cases if case.status != OK)
    assert (result.status, result.reason) == (FAILED, None)
    assert result.figures["value"] == Meaning("s", "a figure")
    assert seen == sorted(seen) and seen[0] >= 1, "what is measured is handed on while the check runs"


@pytest.mark.processes
def test_a_check_ends_at_its_limit_and_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_SHORTEST", 100.0)
    result = run(tmp_path)
    assert [case.name for case in result.cases] == ["first", "raises", "absent", "hangs"]
    assert result.status == FAILED and result.reason == "the limit of 40 s was over before: dies, last"


@pytest.mark.processes
def test_a_check_that_cannot_start_says_why(tmp_path: Path) -> None:
    result = run(tmp_path, "tests.benchmark.broken_check")
    assert result.status == FAILED and not result.cases
    assert result.reason is not None and result.reason == "ImportError: no such library"


def test_a_broken_device_ends_the_process_and_the_next_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_device_is_well", lambda: False)
    told = Told()
    for done in range(2):
        runner.serve_cases(cast(Connection, told), fake_check.__name__, reduced=True, done=done)
    outcomes = [message for _, message in told.messages if isinstance(message, Outcome)]
    assert [outcome.name for outcome in outcomes] == ["first", "raises"]


def test_status_of_a_check() -> None:
    def of(*statuses: str) -> str:
        return status_of([Outcome("", status, 0.0) for status in statuses])

    assert (of(OK, SKIPPED), of(SKIPPED), of(), of(OK, FAILED, SKIPPED)) == (OK, SKIPPED, SKIPPED, FAILED)


def test_all_checks_fit_into_eight_minutes() -> None:
    assert sum(check.limit for check in CHECKS) < 8 * 60
    assert all(check.case_limit < check.limit for check in CHECKS)


def full_report() -> list[CheckResult]:
    """Every case of the full form with every figure, as they come without a GPU's help."""
    made = []
    for check in CHECKS:
        module = importlib.import_module(f"{runner.PACKAGE}.{check.name}")
        figures = {name: "a word" if name in ("outcome", "failures", "shape") else -1.234e-5 for name in module.FIGURES}
        names = [case.name for case in module.cases(reduced=False)]
        cases = [Outcome(name, OK, 1.0, None, {} if name in TEXTS else dict(figures)) for name in names]
        cases[-1] = Outcome(names[-1], FAILED, 1.0, 600 * "long ")
        made.append(CheckResult(check.name, FAILED, 12.0, None, {}, cases))
    return made


def test_the_table_of_a_full_report_fits_into_what_comes_back() -> None:
    text = render(full_report(), {"date": "2026-01-01", "reduced": False, "seconds": 400.0})
    lines = text.splitlines()
    assert len(lines) <= 100 and len(text) < 12000, (len(lines), len(text))
    for line in lines:
        assert len(line) <= WIDTH or line.startswith(("==", "failed")), f"{len(line)}: {line}"


def test_the_table_shows_figures_failures_and_what_was_not_reached() -> None:
    cases = [
        Outcome("bf16 | up to 2048 tokens", OK, 1.0, None, {"tflops": 412.0, "peak_gib": 61.25}),
        Outcome("bf16 | up to 8192 tokens", OK, 1.0, None, {"tflops": 0.00012}),
        Outcome("bf16 TE | up to 2048 tokens", SKIPPED, 0.0, "Transformer Engine is not installed"),
        Outcome("FP8 | up to 2048 tokens", FAILED, 0.0, "RuntimeError: no\nkernel"),
    ]
    result = CheckResult("step", FAILED, 33.3, "the limit of 5 s was over before: transformers", {}, cases)
    text = render([result], {"date": "2026-01-01", "reduced": True, "seconds": 33.3})
    assert "reduced form: the figures say nothing about a GPU" in text
    (row,) = [line for line in text.splitlines() if line.startswith("bf16 ")]
    assert row.split() == ["bf16", "-", "-", "412", "-", "61.2", "-", "-", "1.2e-4", "-", "-"]
    assert "failed: FP8 | up to 2048 tokens: RuntimeError: no kernel" in text
    assert "skipped: bf16 TE | up to 2048 tokens: Transformer Engine is not installed" in text
    assert "step: the limit of 5 s was over before: transformers" in text
    assert text.splitlines()[-1] == "checks: 0 ok, 1 failed, 0 skipped"


def test_a_report_without_time_left_says_so(tmp_path: Path) -> None:
    settings = report.ReportSettings(tmp_path, reduced=True, only=("head", "environment"), minutes=0.0)
    results = report.run_report(settings)
    assert [(each.name, each.status, each.reason) for each in results] == [
        ("environment", SKIPPED, "the time of the whole report was over"),
        ("head", SKIPPED, "the time of the whole report was over"),
    ]
    assert len(json.loads((tmp_path / report.JSON_NAME).read_text())["checks"]) == 2


def test_unknown_checks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--only speed: no such check; there are environment, te"):
        report.chosen_checks(("speed",))
    assert main(["bench", "gpu", "--out", str(tmp_path), "--only", "speed"]) == EXIT_INPUT


@pytest.mark.processes
def test_the_command_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu", "--out", str(tmp_path), "--reduced", "--only", "environment"]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / report.TABLE_NAME).read_text()
    assert printed.splitlines()[-1] == "checks: 1 ok, 0 failed, 0 skipped"
    tree = json.loads((tmp_path / report.JSON_NAME).read_text())
    (check,) = tree["checks"]
    assert tree["reduced"] is True and check["status"] == OK
    figures = {case["name"]: case["figures"] for case in check["cases"]}
    assert figures["versions"]["torch"] and figures["versions"]["transformer-engine"]
    for name in ("bf16 product", "FP8 product", "copy"):
        assert math.isfinite(figures[name]["rate"]) and figures[name]["rate"] > 0
    for case in check["cases"]:
        assert set(case["figures"]) <= set(check["figures"])
    assert check["figures"]["rate"]["unit"] == "T/s"


def test_what_pytest_said() -> None:
    output = """...F
=========================== short test summary info ============================
FAILED tests/models/test_x.py::test_flex[1] - RuntimeError: no
ERROR tests/models/test_y.py
1 failed, 3 passed in 2.00s
"""
    assert closing_line(output) == "1 failed, 3 passed in 2.00s"
    assert failed_tests(output) == ["test_x.py::test_flex[1]", "test_y.py"]
    assert closing_line("") == "pytest said nothing"


def test_every_check_explains_what_the_table_shows() -> None:
    for name, check in BY_NAME.items():
        figures = importlib.import_module(f"{runner.PACKAGE}.{name}").FIGURES
        assert set(check.columns) <= set(figures), name
