"""Each side in a process of its own, which works only when it is told to.

The parent sends one word over a pipe and waits for the answer, so no two sides ever compute at the same time. Children
end when the parent closes them, when the pipe does, and when the parent dies.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

from megatron_tspin.benchmark.lengths import TokenTriplet
from megatron_tspin.benchmark.settings import StepSettings
from megatron_tspin.errors import TspinError

_RUN = "run"
_RATE = "rate"
_STOP_SECONDS = 10.0


class ChildError(TspinError):
    """A child could not do what it was told; the message says why."""


@dataclass(frozen=True)
class Loaded:
    """What a side says once it is loaded: what the process holds (weights, gradients, libraries), and versions."""

    held_mib: float
    memory_method: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Repetition:
    """One forward and backward pass over the global batch: time, peak memory above what was held, and its sums."""

    seconds: float
    cpu_seconds: float
    peak_mib: float
    sums: dict[str, float]


class Child:
    """A process that runs a function of this package with a pipe; a context manager that ends it."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, target, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(at_once=error is not None)

    def ask(self, *message: Any) -> Any:
        """Sends a message, if there is one, and waits for the answer.

        Raises:
            ChildError: The child failed or died.
        """
        try:
            if message:
                self._connection.send(message)
            succeeded, answer = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(_STOP_SECONDS)
            code = self._process.exitcode
            how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            hint = ", which is what happens when memory runs out" if how == "SIGKILL" else ""
            raise ChildError(f"the process died ({how}{hint})") from error
        if not succeeded:
            raise ChildError(answer)
        return answer

    def close(self, at_once: bool = False) -> None:
        """Ends the process; `at_once` does not wait for what it is doing."""
        self._connection.close()  # the child's next look at its pipe is its last
        if not at_once:
            self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Connection, target: Callable[..., None], *arguments: Any) -> None:
    """The life of a child; its failures travel to the parent in one line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    _end_with_parent()
    try:
        target(connection, *arguments)
    except (EOFError, ConnectionError):
        return
    except TspinError as error:
        connection.send((False, str(error)))
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        connection.send((False, f"{type(error).__name__}: {first_line}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def prepare_threads(threads: int) -> None:
    """Before torch is imported: its threads, no network, and no log lines but warnings."""
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    import torch

    from megatron_tspin.log import set_up_logging

    set_up_logging(speak=False)
    torch.set_num_threads(threads)


class SideProcess(Child):
    """The process of a side."""

    def __init__(self, name: str, settings: StepSettings, batch: Sequence[TokenTriplet]) -> None:
        super().__init__(_serve_side, name, settings, list(batch))

    def loaded(self) -> Loaded:
        """Waits until the side is loaded; ask once."""
        answer: Loaded = self.ask()
        return answer

    def run(self) -> Repetition:
        """One repetition."""
        answer: Repetition = self.ask(_RUN)
        return answer

    def matmul_rate(self) -> float:
        """See `machine.matmul_rate`."""
        answer: float = self.ask(_RATE)
        return answer


def _serve_side(connection: Connection, name: str, settings: StepSettings, batch: Sequence[TokenTriplet]) -> None:
    prepare_threads(settings.threads)
    from megatron_tspin.benchmark.machine import matmul_rate
    from megatron_tspin.benchmark.memory import PeakMemory
    from megatron_tspin.benchmark.sides import make_side

    side = make_side(name, settings, batch)
    side.zero_gradients()
    memory = PeakMemory()
    connection.send((True, Loaded(memory.held_mib, memory.method, side.versions())))
    while True:
        (word,) = connection.recv()
        connection.send((True, matmul_rate(settings.bf16) if word == _RATE else _repeat(side, memory)))


def _repeat(side: Any, memory: Any) -> Repetition:
    from megatron_tspin.benchmark.timing import timed
    from megatron_tspin.platform import has_cuda

    if has_cuda():  # asking the device for memory takes time, and the last repetition gave it all back
        side.forward_backward()
    side.zero_gradients()
    memory.reset()
    sums, spent = timed(side.forward_backward)
    peak = memory.peak_mib()
    memory.release()
    return Repetition(spent.seconds, spent.cpu_seconds, peak, sums)
