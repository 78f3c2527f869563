"""Times of work on the device: CUDA events on a GPU, the clock on a CPU; a first run, which compiles, on its own."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from megatron_tspin.platform import has_cuda

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """Seconds of a piece of work: of the first run, and median, least and most of the repeats."""

    first: float
    median: float
    low: float
    high: float
    repeats: int

    def milliseconds(self) -> dict[str, float]:
        """As the figures `milliseconds`, `low`, `high`, `repeats` and `first_seconds`."""
        return {
            "milliseconds": 1e3 * self.median,
            "low": 1e3 * self.low,
            "high": 1e3 * self.high,
            "repeats": float(self.repeats),
            "first_seconds": self.first,
        }

    def rate(self, amount: float) -> dict[str, float]:
        """Amount per second of the median, the slowest and the fastest repeat, as `rate`, `low` and `high`."""
        return {
            "rate": amount / self.median,
            "low": amount / self.high,
            "high": amount / self.low,
            "repeats": float(self.repeats),
        }


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """Runs `work` to its end, on a GPU to the end of its kernels too; returns its result and the seconds it took."""
    if not has_cuda():
        started = time.perf_counter()
        result = work()
        return result, time.perf_counter() - started
    event: Callable[..., torch.cuda.Event] = torch.cuda.Event  # torch leaves its arguments without types
    begin, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    result = work()
    end.record()
    torch.cuda.synchronize()
    return result, float(begin.elapsed_time(end)) / 1e3


def measure(
    work: Callable[[], object],
    seconds: float,
    prepare: Callable[[], object] = lambda: None,
    repeats: int = 5,
    warm_ups: int = 1,
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
    first = timed(work)[1]
    deadline = time.perf_counter() + seconds
    for _ in range(warm_ups):
        prepare()
        work()
    found: list[float] = []
    while not found or (len(found) < repeats and time.perf_counter() < deadline):
        prepare()
        found.append(timed(work)[1])
    return Timing(first, statistics.median(found), min(found), max(found), len(found))
