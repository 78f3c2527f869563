"""The tests that need a GPU or Transformer Engine, by pytest in a process of its own."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import megatron_tspin
from megatron_tspin.benchmark.gpu_report.check import Case, Figures, Meaning, SkippedError

_MARKS = "gpu or te"
_REDUCED_FILE = "models/test_packed_attention.py"
_LIMIT = 45.0
_SHOWN = 12
_NONE_SELECTED = 5
"""pytest's exit code where no test has the marks."""

FIGURES = {
    "outcome": Meaning("", "pytest's closing line"),
    "failures": Meaning("", "names of the tests that failed"),
    "exit_code": Meaning("", "pytest's"),
}


class FailedTestsError(Exception):
    """Tests failed."""


def cases(reduced: bool) -> list[Case]:
    """One run of pytest; without a GPU the tests of one file are only collected."""
    return [Case("pytest", lambda: _run(reduced))]


def _run(reduced: bool) -> Figures:
    tests = Path(megatron_tspin.__file__).parents[1] / "tests"
    if not tests.is_dir() or find_spec("pytest") is None:
        raise SkippedError("tests/ or pytest is missing")
    command = [sys.executable, "-m", "pytest", "-m", _MARKS, "-q", "--tb=line", "-p", "no:cacheprovider"]
    command += ["--collect-only", str(tests / _REDUCED_FILE)] if reduced else [str(tests)]
    done = subprocess.run(
        command, cwd=tests.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT, check=False
    )
    sys.stderr.write(done.stdout + done.stderr)
    closing, failures = closing_line(done.stdout), failed_tests(done.stdout)
    if done.returncode == _NONE_SELECTED:
        raise SkippedError(closing)
    if done.returncode:
        more = f" and {len(failures) - _SHOWN} more" if len(failures) > _SHOWN else ""
        raise FailedTestsError(f"{closing}; {', '.join(failures[:_SHOWN])}{more}")
    return {"outcome": closing, "failures": "", "exit_code": float(done.returncode)}


def closing_line(output: str) -> str:
    """The last line that says something."""
    lines = [line.strip(" =") for line in output.splitlines() if line.strip(" =")]
    return lines[-1] if lines else "pytest said nothing"


def failed_tests(output: str) -> list[str]:
    """Names from pytest's short summary, without their folders."""
    return [name.split("/")[-1] for name in re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)]
