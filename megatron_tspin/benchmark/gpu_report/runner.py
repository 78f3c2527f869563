"""Runs a check in processes of its own, within its time limits, whatever becomes of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import megatron_tspin
from megatron_tspin.benchmark.gpu_report.catalogue import Check
from megatron_tspin.benchmark.gpu_report.child import PACKAGE
from megatron_tspin.benchmark.gpu_report.record import CheckResult, Record

_POLL_SECONDS = 0.1
_SHORTEST = 3.0  # seconds; no further process starts for less
_LAST_CHARACTERS = 400  # of a dead process's log that go into the reason


class CheckRun:
    """A check while it runs. A case that hangs or kills its process costs no other case.

    Args:
        check: The check.
        folder: For its record and its log, `<check>.jsonl` and `<check>.log`.
        reduced: The small form.
        limit: Seconds that the check may take.
        on_progress: Called with the result so far after every case.
        module: Importable name of the check's module, if it is not this package's.
    """

    def __init__(
        self,
        check: Check,
        folder: Path,
        reduced: bool,
        limit: float,
        on_progress: Callable[[CheckResult], None] = lambda result: None,
        module: str | None = None,
    ) -> None:
        self._check, self._reduced, self._limit, self._on_progress = check, reduced, limit, on_progress
        self._case_limit = check.reduced_limit if reduced else check.case_limit
        self._module = module or f"{PACKAGE}.{check.name}"
        self._started = time.monotonic()
        self._record = Record(folder / f"{check.name}.jsonl")
        self._log = folder / f"{check.name}.log"
        self._log.write_text("")

    def run(self) -> CheckResult:
        """Starts processes until no case is left or the limit is over."""
        record, reason = self._record, None
        while reason is None:
            done = len(record.outcomes)
            end = self._run_process()
            record.fail_running(end)
            if record.names is None or (record.left and len(record.outcomes) == done):
                reason = end
            elif not record.left:
                break
            elif self._time_left < _SHORTEST:
                reason = f"the limit of {self._limit:.0f} s was over before: {', '.join(record.left)}"
        return record.result(self._check.name, time.monotonic() - self._started, reason)

    @property
    def _time_left(self) -> float:
        return self._limit - (time.monotonic() - self._started)

    def _run_process(self) -> str:
        """Runs the cases that are left until one hangs; returns how the process ended."""
        done = str(len(self._record.outcomes))
        command = [sys.executable, "-m", f"{PACKAGE}.child", self._module, str(self._record.path), "--done", done]
        with (
            self._log.open("a") as log,
            _process([*command, *["--reduced"] * self._reduced], log, self._reduced) as process,
        ):
            code = self._watch(process)
        self._record.update()
        return code if isinstance(code, str) else self._obituary(code)

    def _watch(self, process: "subprocess.Popen[bytes]") -> int | str:
        """Waits; the exit code, or which limit was over first."""
        while (code := process.poll()) is None:
            time.sleep(_POLL_SECONDS)
            if self._record.update():
                self._on_progress(self._record.result(self._check.name, time.monotonic() - self._started, None))
            if self._time_left <= 0:
                return f"not done within the check's limit of {self._limit:.0f} s"
            if self._record.running_for > self._case_limit:
                return f"not done within a case's limit of {self._case_limit:.0f} s"
        return code

    def _obituary(self, code: int) -> str:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        tail = self._log.read_text(errors="replace").strip()[-_LAST_CHARACTERS:]
        return f"the process died ({how}); the end of its log: {tail}"


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
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
