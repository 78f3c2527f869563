"""The whole report: every check in turn, the JSON file after each, and the table at the end."""

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_tspin.benchmark.gpu_report.catalogue import BY_NAME, CHECKS, Check
from megatron_tspin.benchmark.gpu_report.record import CheckResult
from megatron_tspin.benchmark.gpu_report.runner import CheckRun
from megatron_tspin.benchmark.gpu_report.table import render
from megatron_tspin.benchmark.machine import describe_machine
from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger
from megatron_tspin.storage import write_json, write_text

_log = get_logger(__name__)

JSON_NAME = "gpu_report.json"
TABLE_NAME = "gpu_report.txt"
_SHOWN = 150  # characters of a failure
_NO_TIME = "the time of the whole report was over"


@dataclass(frozen=True)
class ReportSettings:
    """One run of the report.

    Attributes:
        folder: Where the JSON file, the table and the checks' logs go.
        reduced: The small form, which runs on a CPU.
        only: Names of the checks to run; empty for all.
        minutes: After these no process runs any more.
    """

    folder: Path
    reduced: bool
    only: tuple[str, ...]
    minutes: float


def run_report(
    settings: ReportSettings, on_check: Callable[[CheckResult], None] = lambda result: None
) -> list[CheckResult]:
    """Runs the checks; the files are up to date after every case.

    Args:
        settings: What to run.
        on_check: Called with each check's result.

    Raises:
        InputError: No such check.
    """
    checks = chosen_checks(settings.only)
    started = time.monotonic()
    results: list[CheckResult] = []
    machine, date = describe_machine(), datetime.now().astimezone().isoformat(timespec="seconds")

    def save(last: CheckResult) -> None:
        so_far = [*results, last]
        head = {
            "benchmark": "gpu_report",
            "date": date,
            "reduced": settings.reduced,
            "seconds": round(time.monotonic() - started, 1),
            "machine": machine,
        }
        write_json(settings.folder / JSON_NAME, head | {"checks": [dataclasses.asdict(each) for each in so_far]})
        write_text(settings.folder / TABLE_NAME, render(so_far, head))

    with _temporary_folder():
        granted = 0.0
        for check in checks:
            # What earlier checks did not use is added, so that all of them together keep to the sum of their limits.
            granted += check.reduced_limit if settings.reduced else check.limit
            limit = min(granted, 60 * settings.minutes) - (time.monotonic() - started)
            if limit <= 0:
                result = CheckResult(check.name, reason=_NO_TIME)
            else:
                result = CheckRun(check, settings.folder / "logs", settings.reduced, limit, save).run()
            save(result)
            results.append(result)
            on_check(result)
            _log.info("%s: %s, %.1f s", check.name, result.status, result.seconds)
    return results


def chosen_checks(only: tuple[str, ...]) -> list[Check]:
    """The checks in the order of the catalogue.

    Raises:
        InputError: No such check.
    """
    unknown = [name for name in only if name not in BY_NAME]
    if unknown:
        raise InputError(f"--only {' '.join(unknown)}: no such check; there are {', '.join(BY_NAME)}")
    return [check for check in CHECKS if not only or check.name in only]


@contextmanager
def _temporary_folder() -> Iterator[None]:
    """For what the checks write on the side, compiled kernels too: a killed process cleans nothing up."""
    before = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="tspin_gpu_report_", ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before


def print_table(settings: ReportSettings) -> None:
    """Prints the table as it was last written."""
    sys.stdout.write((settings.folder / TABLE_NAME).read_text(encoding="utf-8"))
    sys.stdout.flush()


def has_failed(results: list[CheckResult]) -> list[str]:
    """Names of the checks that failed, with the first reason."""
    found = []
    for result in results:
        if result.status != "failed":
            continue
        reasons: list[Any] = [result.reason, *(case.reason for case in result.cases if case.status == "failed")]
        first = next((reason for reason in reasons if reason), "")
        found.append(f"{result.name}: {' '.join(first.split())}"[:_SHOWN])
    return found
