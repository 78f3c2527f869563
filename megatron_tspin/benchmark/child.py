"""A process that works only when it is told to, and whose failures are the parent's to report.

Parent and child talk over a pipe: the child answers `(True, answer)`, or `(False, message)` when it fails. It leads a
process group of its own, which is gone when the parent closes it, when the pipe does, and when the parent dies.
"""

import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_tspin.errors import TspinError
from megatron_tspin.log import set_up_logging

_STOP_SECONDS = 10.0
_LOOK_SECONDS = 0.5  # between two looks whether the child is alive
_LAST_CHARACTERS = 400  # of a dead process's log that go into the message


class ChildError(TspinError):
    """A child could not do what it was told; the message says why."""


class Child:
    """A process that runs a function of an importable module; a context manager that ends it.

    Args:
        target: Called with the child's end of the pipe and the arguments. Its module imports no torch, so that what
            `environment` says still counts.
        arguments: Further arguments, pickled.
        environment: Variables to set before `target` is called.
        log: File that standard output and error are appended to; None leaves them the parent's.
    """

    def __init__(
        self,
        target: Callable[..., None],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._log = log
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, dict(environment or {}), log, target, arguments))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(at_once=error is not None)

    def ask(self, *message: Any, seconds: float = math.inf) -> Any:
        """Sends a message and waits for the answer; see `receive`."""
        with suppress(ConnectionError):  # `receive` says how it died
            self._connection.send(message)
        return self.receive(seconds)

    def receive(self, seconds: float = math.inf) -> Any:
        """Waits for an answer.

        Args:
            seconds: Longest wait.

        Raises:
            ChildError: The child failed or died.
            TimeoutError: There was no answer.
        """
        deadline = time.monotonic() + seconds
        while not self._connection.poll(max(0.0, min(_LOOK_SECONDS, deadline - time.monotonic()))):
            # A fork that outlives the child holds its end of the pipe open.
            if not self._process.is_alive() and not self._connection.poll():
                raise ChildError(self._obituary())
            if time.monotonic() >= deadline:
                raise TimeoutError
        try:
            succeeded, answer = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise ChildError(self._obituary()) from error
        if not succeeded:
            raise ChildError(answer)
        return answer

    def _obituary(self) -> str:
        self._process.join(_STOP_SECONDS)
        code = self._process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        hint = ", which is what happens when memory runs out" if how == "SIGKILL" else ""
        tail = self._log.read_text(errors="replace").strip()[-_LAST_CHARACTERS:] if self._log is not None else ""
        return f"the process died ({how}{hint})" + (f"; the end of its log: {tail}" if tail else "")

    def close(self, at_once: bool = False) -> None:
        """Ends the process and its group; `at_once` does not wait for what it is doing."""
        self._connection.close()  # the child's next look at its pipe is its last
        if not at_once:
            self._process.join(_STOP_SECONDS)
        assert self._process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # it may be so young that it leads no group yet
        self._process.join()


def threads_environment(threads: int) -> dict[str, str]:
    """Variables that limit torch to so many threads."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def _serve(
    connection: Connection,
    environment: dict[str, str],
    log: Path | None,
    target: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """The life of a child; its failures travel to the parent in one line."""
    os.setsid()  # Ctrl-C is the parent's affair
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    if log is not None:
        with log.open("ab") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
    set_up_logging(speak=False)
    try:
        _answer(connection, target, arguments, log is not None)
    finally:
        connection.close()  # the parent need not wait for destructors, which may hang on a broken device


def _answer(connection: Connection, target: Callable[..., None], arguments: tuple[Any, ...], has_log: bool) -> None:
    with suppress(EOFError, ConnectionError):  # the parent has closed its end
        try:
            target(connection, *arguments)
        except (EOFError, ConnectionError):
            return
        except TspinError as error:
            connection.send((False, str(error)))
        except Exception as error:
            if has_log:
                traceback.print_exc()
            first_line = (str(error).splitlines() or [""])[0]
            connection.send((False, f"{type(error).__name__}: {first_line}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)
