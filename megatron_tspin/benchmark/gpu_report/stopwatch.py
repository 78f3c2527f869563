"""Times of work on the device: events on a GPU, the clock on a CPU; the first run, which compiles, on its own."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_tspin.benchmark.gpu_report.catalogue import Meaning
from megatron_tspin.platform import has_cuda

_REPEATS = 5
_WARM_UPS = 1


@dataclass(frozen=True)
class Timing:
    """Seconds of a piece of work: of the first run, and median, least and most of the repeats."""

    first: float
    median: float
    low: float
    high: float
    repeats: int

    def milliseconds(self) -> dict[str, float]:
        """As figures, by the names of `MEANINGS`."""
        return {
            "milliseconds": 1e3 * self.median,
            "low": 1e3 * self.low,
            "high": 1e3 * self.high,
            "repeats": float(self.repeats),
            "first_seconds": self.first,
        }


MEANINGS = {
    "milliseconds": Meaning("ms", "median over the repeats, by CUDA events (on a CPU by the clock)"),
    "low": Meaning("ms", "least of the repeats"),
    "high": Meaning("ms", "most of the repeats"),
    "repeats": Meaning("", "timed runs, after the first and mostly one more"),
    "first_seconds": Meaning("s", "wall time of the first run, compilation included; in no other figure"),
}


def measure(
    work: Callable[[], object],
    seconds: float,
    prepare: Callable[[], object] = lambda: None,
    repeats: int = _REPEATS,
    warm_ups: int = _WARM_UPS,
) -> Timing:
    """Times `work`.

    Args:
        work: Runs on the device of this process.
        seconds: No repeat starts later than this after the first run; at least one is timed.
        prepare: Called before each run, outside the timing.
        repeats: Most timed runs.
        warm_ups: Untimed runs between the first and the timed ones.
    """
    prepare()
    _synchronise()
    started = time.perf_counter()
    work()
    _synchronise()
    first = time.perf_counter() - started
    deadline = time.perf_counter() + seconds
    for _ in range(warm_ups):
        prepare()
        work()
    found: list[float] = []
    while not found or (len(found) < repeats and time.perf_counter() < deadline):
        prepare()
        found.append(_once(work))
    return Timing(first, statistics.median(found), min(found), max(found), len(found))


def _once(work: Callable[[], object]) -> float:
    if not has_cuda():
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    event: Callable[..., torch.cuda.Event] = torch.cuda.Event  # torch leaves its arguments without types
    begin, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _synchronise() -> None:
    if has_cuda():
        torch.cuda.synchronize()


def rate(timing: Timing, amount: float) -> dict[str, float]:
    """Amount per second of the median, and of the slowest and the fastest repeat, as `rate`, `low` and `high`."""
    return {
        "rate": amount / timing.median,
        "low": amount / timing.high,
        "high": amount / timing.low,
        "repeats": float(timing.repeats),
    }
