"""A check, the cases that it measures, and what came of them.

No torch here: the process that starts the checks must survive whatever they do to the device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megatron_tspin.errors import TspinError

Figures = Mapping[str, float | str]
"""By the names of the check's table of meanings."""

OK = "ok"
FAILED = "failed"
SKIPPED = "skipped"
REASON_CHARACTERS = 600


@dataclass(frozen=True)
class Check:
    """One check, a module of this package with `FIGURES`, meanings by name, and `cases(reduced)`.

    Attributes:
        name: Of the module, and on the command line.
        title: One line for the table.
        limit: Seconds that all its cases may take on a GPU, start of the process included; more where earlier checks
            left some of theirs.
        case_limit: Seconds that one case may take; the ones behind it still run then.
        columns: Figures that the table shows. All of them are in the JSON file.
        across: Cases are named `row | column` and make one table row together.
        reduced_limit: Both limits of the reduced form.
    """

    name: str
    title: str
    limit: float
    case_limit: float
    columns: tuple[str, ...]
    across: bool = False
    reduced_limit: float = 120.0


@dataclass(frozen=True)
class Meaning:
    """What a figure is: its unit, "" for a ratio or a text, and one line."""

    unit: str
    what: str


TIMES = {
    "milliseconds": Meaning("ms", "median over the repeats, by CUDA events (on a CPU by the clock)"),
    "low": Meaning("ms", "least of the repeats"),
    "high": Meaning("ms", "most of the repeats"),
    "repeats": Meaning("", "timed runs, after the first and mostly one more"),
    "first_seconds": Meaning("s", "wall time of the first run, compilation included; in no other figure"),
}
"""The figures of `Timing.milliseconds`."""


class SkippedError(TspinError):
    """What the case measures cannot be had here; the message says what is missing."""


@dataclass(frozen=True)
class Case:
    """Something to run, by name. It returns figures, or raises `SkippedError` or whatever goes wrong."""

    name: str
    run: Callable[[], Figures]


@dataclass
class Outcome:
    """What came of a case.

    Attributes:
        name: Of the case.
        status: `OK`, `FAILED` or `SKIPPED`.
        seconds: Wall time, preparation included.
        reason: Why it has no figures, `REASON_CHARACTERS` at most.
        figures: None of a case that failed.
    """

    name: str
    status: str
    seconds: float
    reason: str | None = None
    figures: dict[str, float | str] = field(default_factory=dict)


@dataclass
class CheckResult:
    """What came of a check.

    Attributes:
        name: Of the check.
        status: See `status_of`; failed too where cases were not reached.
        seconds: Wall time, processes' start included.
        reason: Why the check as a whole has no result, or not all of it.
        figures: By name the unit and the meaning.
        cases: Outcomes, in order.
    """

    name: str
    status: str = SKIPPED
    seconds: float = 0.0
    reason: str | None = None
    figures: dict[str, Meaning] = field(default_factory=dict)
    cases: list[Outcome] = field(default_factory=list)


def status_of(outcomes: list[Outcome]) -> str:
    """Of a check: failed if a case failed, skipped if all were (or there were none)."""
    found = {outcome.status for outcome in outcomes}
    return FAILED if FAILED in found else OK if OK in found else SKIPPED
