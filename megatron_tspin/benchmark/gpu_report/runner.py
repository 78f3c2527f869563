"""Runs a check in processes of its own, within its time limits, whatever becomes of them.

The process of a check says which cases there are and what their figures mean, then the number of a case when it starts
and its outcome when it is over, so that nothing measured is lost. A case whose failure leaves the device unusable ends
the process, and another one runs the cases that are left.
"""

import gc
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_tspin.benchmark.child import Child, ChildError, threads_environment
from megatron_tspin.benchmark.gpu_report.check import (
    FAILED,
    OK,
    REASON_CHARACTERS,
    SKIPPED,
    Case,
    Check,
    CheckResult,
    Outcome,
    SkippedError,
    status_of,
)

PACKAGE = "megatron_tspin.benchmark.gpu_report"
_SHORTEST = 3.0  # seconds; no further process starts for less
_GRAPHS = 128


class CheckRun:
    """A check while it runs. A case that hangs or kills its process costs no other case.

    Args:
        check: The check.
        folder: For its log, `<check>.log`.
        reduced: The small form.
        limit: Seconds that the check may take.
        on_progress: Called with the result so far after every case.
        module: Importable name of the check's module, if it is not this package's.
        environment: Variables for its processes.

    Attributes:
        result: As far as it has got.
    """

    def __init__(
        self,
        check: Check,
        folder: Path,
        reduced: bool,
        limit: float,
        on_progress: Callable[[CheckResult], None] = lambda result: None,
        module: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.result = CheckResult(check.name, FAILED)
        self._reduced, self._limit, self._on_progress = reduced, limit, on_progress
        self._case_limit = check.reduced_limit if reduced else check.case_limit
        self._module = module or f"{PACKAGE}.{check.name}"
        # Figures of the reduced form mean nothing, and threads wait for each other on busy cores.
        self._environment = {**(environment or {}), **(threads_environment(1) if reduced else {})}
        self._log = folder / f"{check.name}.log"
        folder.mkdir(parents=True, exist_ok=True)
        self._log.write_text("")
        self._started = time.monotonic()
        self._names: list[str] | None = None
        self._running: tuple[int, float] | None = None  # number of the case, and when it was seen to start

    def run(self) -> CheckResult:
        """Starts processes until no case is left or the limit is over."""
        result = self.result
        while result.reason is None and self._left != []:
            done = len(result.cases)
            end = self._run_process()
            if self._names is None or (self._left and len(result.cases) == done):
                result.reason = end[:REASON_CHARACTERS]
            elif self._left and self._time_left < _SHORTEST:
                left = f"the limit of {self._limit:.0f} s was over before: {', '.join(self._left)}"
                result.reason = left[:REASON_CHARACTERS]
        self._settle()
        return result

    @property
    def _left(self) -> list[str] | None:
        """Cases that are not over; None as long as nobody has said which there are."""
        return None if self._names is None else self._names[len(self.result.cases) :]

    @property
    def _time_left(self) -> float:
        return self._limit - (time.monotonic() - self._started)

    def _run_process(self) -> str:
        """Runs the cases that are left until one hangs or the process is over; returns how that was."""
        arguments = (self._module, self._reduced, len(self.result.cases))
        with Child(serve_cases, *arguments, environment=self._environment, log=self._log) as child:
            try:
                while self._left != []:
                    self._take(child.receive(self._patience))
            except (ChildError, TimeoutError) as error:
                end = str(error) or self._limit_that_is_over()
                self._blame_running(end)
                child.close(at_once=True)
                return end
        return ""

    @property
    def _patience(self) -> float:
        case_left = self._limit if self._running is None else self._case_limit - (time.monotonic() - self._running[1])
        return max(0.0, min(self._time_left, case_left))

    def _limit_that_is_over(self) -> str:
        if self._time_left <= 0:
            return f"not done within the check's limit of {self._limit:.0f} s"
        return f"not done within a case's limit of {self._case_limit:.0f} s"

    def _take(self, message: Any) -> None:
        if isinstance(message, Outcome):
            self.result.cases.append(message)
            self._running = None
            self._settle()
            self._on_progress(self.result)
        elif isinstance(message, int):
            self._running = message, time.monotonic()
        else:
            self._names, self.result.figures = message

    def _blame_running(self, reason: str) -> None:
        if self._running is None or self._names is None:
            return
        number, started = self._running
        seconds = round(time.monotonic() - started, 3)
        self._take(Outcome(self._names[number], FAILED, seconds, reason[:REASON_CHARACTERS]))

    def _settle(self) -> None:
        complete = self._left == [] and self.result.reason is None
        self.result.status = status_of(self.result.cases) if complete else FAILED
        self.result.seconds = round(time.monotonic() - self._started, 1)


def serve_cases(connection: Connection, module_name: str, reduced: bool, done: int = 0) -> None:
    """Runs the cases of a check's module from number `done`, until one leaves the device unusable.

    Args:
        connection: Gets the cases' names and the figures' meanings, then a case's number before and its outcome after
            it.
        module_name: Importable name; see `check.Check`.
        reduced: The small form.
        done: Cases to leave out.
    """
    module = importlib.import_module(module_name)
    cases: list[Case] = module.cases(reduced)
    _allow_many_graphs()
    connection.send((True, ([case.name for case in cases], module.FIGURES)))
    for number, case in enumerate(cases[done:], start=done):
        connection.send((True, number))
        connection.send((True, _run(case, set(module.FIGURES))))
        if not _device_is_well():
            return


def _allow_many_graphs() -> None:
    """A check compiles one function for many shapes and types; past its limit torch would run it uncompiled."""
    if "torch" in sys.modules:
        import torch._dynamo

        torch._dynamo.config.recompile_limit = _GRAPHS


def _run(case: Case, known: set[str]) -> Outcome:
    sys.stderr.write(f"--- {case.name}\n")
    started = time.perf_counter()
    status, reason, figures = OK, None, {}
    try:
        figures = dict(case.run())
    except SkippedError as error:
        status, reason = SKIPPED, str(error)[:REASON_CHARACTERS]
    except Exception as error:
        traceback.print_exc()
        status, reason = FAILED, f"{type(error).__name__}: {error}"[:REASON_CHARACTERS]
    assert set(figures) <= known, f"{case.name}: {set(figures) - known} are figures that the check does not explain"
    return Outcome(case.name, status, round(time.perf_counter() - started, 3), reason, figures)


def _device_is_well() -> bool:
    """Whether CUDA still answers; also gives back what the case left. After some errors every call fails."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        traceback.print_exc()
        return False
    return True
