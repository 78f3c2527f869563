"""Starts the checks one after another, each in its own process with a time limit, and keeps what they measured."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import megatron_tspin
from megatron_tspin.benchmark.gpu_report.case import FAILED, REASON_CHARACTERS, SKIPPED, Outcome, status_of
from megatron_tspin.benchmark.gpu_report.catalogue import Check
from megatron_tspin.benchmark.gpu_report.child import PACKAGE, POISONED
from megatron_tspin.log import get_logger

_log = get_logger(__name__)

_POLL_SECONDS = 0.1
_SHORTEST = 3.0  # seconds; no process starts for less
_LAST_LINES = 400  # characters of a dead process's log that go into the reason


@dataclass
class CheckResult:
    """What came of a check.

    Attributes:
        name: Of the check.
        status: See `case.status_of`.
        seconds: Wall time, processes' start included.
        reason: Why the check as a whole has no result.
        figures: By name the unit and the meaning.
        cases: Outcomes, in order.
    """

    name: str
    status: str = SKIPPED
    seconds: float = 0.0
    reason: str | None = None
    figures: dict[str, dict[str, str]] = field(default_factory=dict)
    cases: list[Outcome] = field(default_factory=list)


class _Record:
    """The file that a check's processes append to, as far as it has been read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self._read = 0
        self.names: list[str] | None = None
        self.figures: dict[str, dict[str, str]] = {}
        self.outcomes: list[Outcome] = []
        self.running: int | None = None

    def update(self) -> None:
        """Reads whole lines that are new."""
        with self.path.open(encoding="utf-8") as stream:
            stream.seek(self._read)
            while (line := stream.readline()).endswith("\n"):
                self._read = stream.tell()
                self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        if "cases" in line:
            self.names, self.figures = line["cases"], line["figures"]
        elif "started" in line:
            self.running = line["started"]
        else:
            self.outcomes.append(Outcome(**line["outcome"]))
            self.running = None

    def fail_running(self, reason: str, seconds: float) -> bool:
        """Blames the case that was running; False where none was."""
        if self.running is None:
            return False
        assert self.names is not None
        name = self.names[self.running]
        self.outcomes.append(Outcome(name, FAILED, round(seconds, 3), reason[:REASON_CHARACTERS]))
        self.running = None
        return True

    @property
    def left(self) -> list[str]:
        return [] if self.names is None else self.names[len(self.outcomes) :]


def run_check(
    check: Check,
    folder: Path,
    reduced: bool,
    limit: float,
    module: str | None = None,
    on_progress: Callable[[CheckResult], None] = lambda result: None,
) -> CheckResult:
    """Runs a check to its end or to its limit; a case that kills its process costs no other case.

    Args:
        check: The check.
        folder: For its record and its log, `<check>.jsonl` and `<check>.log`.
        reduced: The small form.
        limit: Seconds.
        module: Importable name, if it is not this package's.
        on_progress: Called with the result so far after every process.
    """
    started, record = time.monotonic(), _Record(folder / f"{check.name}.jsonl")
    result = CheckResult(check.name)
    log = folder / f"{check.name}.log"
    log.write_text("")
    while True:
        time_left = limit - (time.monotonic() - started)
        if time_left < _SHORTEST and record.names is not None:
            result.reason = f"the limit of {limit:.0f} s was over before: {', '.join(record.left)}"
            break
        done = len(record.outcomes)
        code = _run_process(module or f"{PACKAGE}.{check.name}", record, log, reduced, time_left)
        ended_in = _how(code, limit, log)
        blamed = record.fail_running(ended_in, time.monotonic() - started)
        if record.names is None or (not record.left and not blamed and code not in (0, POISONED)):
            result.reason = ended_in[:REASON_CHARACTERS]
        _fill(result, record, time.monotonic() - started)
        on_progress(result)
        if record.names is None or not record.left or len(record.outcomes) == done:
            break
    _fill(result, record, time.monotonic() - started)
    return result


def _fill(result: CheckResult, record: _Record, seconds: float) -> None:
    result.seconds, result.figures, result.cases = round(seconds, 1), record.figures, list(record.outcomes)
    complete = record.names is not None and not record.left
    result.status = status_of(result.cases) if complete and result.reason is None else FAILED


def _run_process(module: str, record: _Record, log: Path, reduced: bool, limit: float) -> int | None:
    """Runs the cases that are left; the exit code, or None where the limit was over first."""
    command = [sys.executable, "-m", f"{PACKAGE}.child", module, str(record.path), "--done", str(len(record.outcomes))]
    command += ["--reduced"] * reduced
    deadline = time.monotonic() + limit
    with log.open("a") as stream, _process(command, stream, reduced) as process:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        code = process.poll()
    record.update()
    return code


@contextmanager
def _process(command: Sequence[str], log: Any, reduced: bool) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that leads its own group; the whole group is gone at the end."""
    root = str(Path(megatron_tspin.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if reduced:
        environment["OMP_NUM_THREADS"] = "1"  # its figures mean nothing, and threads wait for each other on busy cores
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=environment
    )
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _how(code: int | None, limit: float, log: Path) -> str:
    """How a process ended that did not finish its cases."""
    if code is None:
        return f"not done within the check's limit of {limit:.0f} s"
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    tail = log.read_text(errors="replace").strip()[-_LAST_LINES:]
    return f"the process died ({how}); the end of its log: {tail}"
