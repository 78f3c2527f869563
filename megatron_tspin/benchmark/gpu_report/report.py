"""The whole report: every check in turn, the JSON file after each case, and the table at the end."""

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_tspin.benchmark.gpu_report.catalogue import BY_NAME, CHECKS
from megatron_tspin.benchmark.gpu_report.check import FAILED, Check, CheckResult
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


class _Files:
    """The JSON file and the table, written again after every case."""

    def __init__(self, settings: ReportSettings) -> None:
        self._settings = settings
        self._started = time.monotonic()
        self._date, self._machine = datetime.now().astimezone().isoformat(timespec="seconds"), describe_machine()
        self.results: list[CheckResult] = []

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def save(self, last: CheckResult) -> None:
        """Writes what is there, with a check that may still run."""
        so_far = [*self.results, last]
        head: dict[str, Any] = {
            "benchmark": "gpu_report",
            "date": self._date,
            "reduced": self._settings.reduced,
            "seconds": round(self.seconds, 1),
            "machine": self._machine,
        }
        folder = self._settings.folder
        write_json(folder / JSON_NAME, head | {"checks": [dataclasses.asdict(each) for each in so_far]})
        write_text(folder / TABLE_NAME, render(so_far, head))


def run_report(settings: ReportSettings) -> list[CheckResult]:
    """Runs the checks; the files are up to date after every case.

    Raises:
        InputError: No such check.
    """
    checks, files, granted = chosen_checks(settings.only), _Files(settings), 0.0
    # For what the checks write on the side, compiled kernels too: a killed process cleans nothing up.
    with tempfile.TemporaryDirectory(prefix="tspin_gpu_report_", ignore_cleanup_errors=True) as side_folder:
        for check in checks:
            # What earlier checks did not use is added, so that all of them together keep to the sum of their limits.
            granted += check.reduced_limit if settings.reduced else check.limit
            limit = min(granted, 60 * settings.minutes) - files.seconds
            result = CheckResult(check.name, reason=_NO_TIME)
            if limit > 0:
                environment, logs = {"TMPDIR": side_folder}, settings.folder / "logs"
                run = CheckRun(check, logs, settings.reduced, limit, files.save, environment=environment)
                result = run.run()
            files.save(result)
            files.results.append(result)
            _log.info("%s: %s, %.1f s", check.name, result.status, result.seconds)
    return files.results


def chosen_checks(only: tuple[str, ...]) -> list[Check]:
    """The checks in the order of the catalogue.

    Raises:
        InputError: No such check.
    """
    unknown = [name for name in only if name not in BY_NAME]
    if unknown:
        raise InputError(f"--only {' '.join(unknown)}: no such check; there are {', '.join(BY_NAME)}")
    return [check for check in CHECKS if not only or check.name in only]


def failures(results: list[CheckResult]) -> list[str]:
    """Names of the checks that failed, with the first reason."""
    found = []
    for result in results:
        if result.status == FAILED:
            reasons = [result.reason, *(case.reason for case in result.cases if case.status == FAILED)]
            first = next((reason for reason in reasons if reason), "")
            found.append(f"{result.name}: {' '.join(first.split())}"[:_SHOWN])
    return found
