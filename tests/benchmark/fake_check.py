"""A check whose cases end in every way that a case can."""

import os
import signal
import time

from megatron_tspin.benchmark.gpu_report.check import Case, Figures, Meaning, SkippedError

FIGURES = {"value": Meaning("s", "a figure"), "word": Meaning("", "a text")}


def cases(reduced: bool) -> list[Case]:
    return [
        Case("first", lambda: {"value": 1.0}),
        Case("raises", _raise),
        Case("absent", _skip),
        Case("hangs", _hang),
        Case("dies", _die),
        Case("last", lambda: {"value": 2.0, "word": "reduced" if reduced else "full"}),
    ]


def _raise() -> Figures:
    raise ValueError("not like this " + 1000 * "x")


def _skip() -> Figures:
    raise SkippedError("nothing to measure with")


def _hang() -> Figures:
    time.sleep(60)
    return {}


def _die() -> Figures:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}
