"""Wall time of a piece of work on the device of this process."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from megatron_tspin.platform import has_cuda

Result = TypeVar("Result")


@dataclass(frozen=True)
class Spent:
    """What some work took.

    Attributes:
        seconds: Wall time.
        cpu_seconds: Of all threads of this process. Without a GPU, far less than wall time x threads tells of other
            processes that took the cores.
    """

    seconds: float
    cpu_seconds: float


def timed(work: Callable[[], Result]) -> tuple[Result, Spent]:
    """Runs `work` to its end, on a GPU to the end of its kernels too; returns its result and what it took."""
    gc.collect()
    _synchronise()
    started, cpu_started = time.perf_counter(), time.process_time()
    result = work()
    _synchronise()
    return result, Spent(time.perf_counter() - started, time.process_time() - cpu_started)


def _synchronise() -> None:
    if has_cuda():
        torch.cuda.synchronize()
