"""Whether somebody wants this process to stop soon: a scheduler before a time limit or a preemption, or a person.

A program that can end in order says so with `heeded` and looks at `stop_requested` where it may stop. Anywhere else the
signals end it at once, as they do any program.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What Slurm, Kubernetes and torchrun send (`--signal=USR1@120` of sbatch)."""

_SAME_REQUEST_SECONDS = 5.0
"""A scheduler may signal a rank, its launcher and the driver, who hand it on: within so long it is one request."""

_requested: str | None = None
_since = 0.0


def stop_requested() -> str | None:
    """Name of the signal that asked for it; None while nobody has."""
    return _requested


@contextmanager
def heeded(
    signals: tuple[signal.Signals, ...] = STOP_SIGNALS, on_request: Callable[[str, bool], None] | None = None
) -> Iterator[None]:
    """Lets the block end in order when it is asked to.

    Args:
        signals: What asks.
        on_request: Called in the signal's handler with its name and whether it is not the first. Default: nothing for
            the first, and another one, some seconds later, ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        global _requested, _since
        again = _requested is not None
        if again and time.monotonic() - _since < _SAME_REQUEST_SECONDS:
            return
        if not again:
            _requested, _since = signal.Signals(number).name, time.monotonic()
        if on_request is not None:
            on_request(signal.Signals(number).name, again)
        elif again:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    former = {number: signal.signal(number, note) for number in signals}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
