"""What the processes of a check have written so far, read by the process that watches them."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tspin.benchmark.gpu_report.case import FAILED, REASON_CHARACTERS, SKIPPED, Outcome, status_of


@dataclass
class CheckResult:
    """What came of a check.

    Attributes:
        name: Of the check.
        status: See `case.status_of`; failed too where cases were not reached.
        seconds: Wall time, processes' start included.
        reason: Why the check as a whole has no result, or not all of it.
        figures: By name the unit and the meaning.
        cases: Outcomes, in order.
    """

    name: str
    status: str = SKIPPED
    seconds: float = 0.0
    reason: str | None = None
    figures: dict[str, dict[str, str]] = field(default_factory=dict)
    cases: list[Outcome] = field(default_factory=list)


class Record:
    """The file that the processes append to (see `child`), as far as it has been read.

    Attributes:
        path: The file; it is emptied.
        names: Of the cases; None until a process has said them.
        figures: Their meanings.
        outcomes: Of the cases that are over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self._read = 0
        self.names: list[str] | None = None
        self.figures: dict[str, dict[str, str]] = {}
        self.outcomes: list[Outcome] = []
        self._running: tuple[int, float] | None = None  # number of the case, and when it was seen to start

    def update(self) -> bool:
        """Reads the whole lines that are new; whether a case ended."""
        before = len(self.outcomes)
        with self.path.open(encoding="utf-8") as stream:
            stream.seek(self._read)
            while (line := stream.readline()).endswith("\n"):
                self._read = stream.tell()
                self._take(json.loads(line))
        return len(self.outcomes) > before

    def _take(self, line: dict[str, Any]) -> None:
        if "cases" in line:
            self.names, self.figures = line["cases"], line["figures"]
        elif "started" in line:
            self._running = line["started"], time.monotonic()
        else:
            self.outcomes.append(Outcome(**line["outcome"]))
            self._running = None

    @property
    def running_for(self) -> float:
        """Seconds that the case which runs has been running; 0 where none does."""
        return 0.0 if self._running is None else time.monotonic() - self._running[1]

    def fail_running(self, reason: str) -> None:
        """Blames the case that runs, if one does."""
        if self._running is None:
            return
        assert self.names is not None
        seconds = round(self.running_for, 3)
        self.outcomes.append(Outcome(self.names[self._running[0]], FAILED, seconds, reason[:REASON_CHARACTERS]))
        self._running = None

    @property
    def left(self) -> list[str]:
        """Cases that are not over."""
        return [] if self.names is None else self.names[len(self.outcomes) :]

    def result(self, name: str, seconds: float, reason: str | None) -> CheckResult:
        """The check as it stands."""
        complete = self.names is not None and not self.left and reason is None
        return CheckResult(
            name,
            status_of(self.outcomes) if complete else FAILED,
            round(seconds, 1),
            None if reason is None else reason[:REASON_CHARACTERS],
            self.figures,
            list(self.outcomes),
        )
