"""A case: one thing that a check measures, and what came of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megatron_tspin.errors import TspinError

Figures = Mapping[str, float | str]
"""By the names of the check's table of meanings."""

OK = "ok"
FAILED = "failed"
SKIPPED = "skipped"
REASON_CHARACTERS = 600


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


def status_of(outcomes: list[Outcome]) -> str:
    """Of a check: failed if a case failed, skipped if all were (or there were none)."""
    found = {outcome.status for outcome in outcomes}
    return FAILED if FAILED in found else OK if OK in found else SKIPPED
