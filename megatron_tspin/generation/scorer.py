"""The user's function that judges an answer."""

import contextlib
import copy
import ctypes
import faulthandler
import importlib
import importlib.util
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_tspin.errors import InputError
from megatron_tspin.storage import sha256_file

_STDOUT, _STDERR = 1, 2
_LEAST_GRACE_SECONDS = 1.0

Scorer = Callable[[Mapping[str, Any], str], float]
"""Takes the user's record of the example and the text of an answer; returns a score from 0 to 1."""


def load_scorer(name: str) -> Scorer:
    """Loads `path/to/file.py:function` or `package.module:function`.

    Raises:
        InputError: There is no such file, module or function.
    """
    place, separator, function = name.rpartition(":")
    if not separator:
        raise InputError(f"evaluation.scorer = {name!r}: write it as path/to/file.py:function or module:function")
    module = _from_file(Path(place), name) if place.endswith(".py") else _from_module(place, name)
    scorer = getattr(module, function, None)
    if not callable(scorer):
        raise InputError(f"evaluation.scorer = {name!r}: {place} has no function `{function}`")
    found: Scorer = scorer
    return found


def scorer_digest(name: str) -> str:
    """Hex SHA-256 of the scorer's file, or the name of its installed module.

    Raises:
        InputError: The file is not there.
    """
    place = name.rpartition(":")[0]
    if not place.endswith(".py"):
        return place
    if not Path(place).is_file():
        raise InputError(f"evaluation.scorer = {name!r}: {place} is not a file")
    return sha256_file(Path(place))


def _from_file(path: Path, name: str) -> Any:
    if not path.is_file():
        raise InputError(f"evaluation.scorer = {name!r}: {path} is not a file")
    spec = importlib.util.spec_from_file_location(f"tspin_scorer_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    _let_import_from(path.absolute().parent)
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit: it is the scorer's, not ours
        raise InputError(
            f"evaluation.scorer = {name!r}: loading it failed at {_place(error, path)}: {type(error).__name__}: {error}"
        ) from error
    return module


def _let_import_from(folder: Path) -> None:
    """Modules beside the scorer are found before installed ones, and never in place of Python's own."""
    if str(folder) in sys.path:
        return
    sites = [index for index, entry in enumerate(sys.path) if Path(entry).name in ("site-packages", "dist-packages")]
    sys.path.insert(min(sites, default=len(sys.path)), str(folder))


def _place(error: BaseException, path: Path) -> str:
    """Where in the scorer's file it happened, not in what it called."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    return f"{path}:{lines[-1] if lines else getattr(error, 'lineno', None) or 1}"


def _from_module(place: str, name: str) -> Any:
    try:
        return importlib.import_module(place)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the module raises; TypeError and ValueError for no name or a relative one
        raise InputError(f"evaluation.scorer = {name!r}: {error}") from error


def score_answer(
    scorer: Scorer, record: Mapping[str, Any], text: str, example_id: str, seconds: float = math.inf
) -> float:
    """Calls the scorer, with a record of its own to change; what it prints goes to stderr.

    Args:
        scorer: The user's function.
        record: The user's line.
        text: The answer.
        example_id: Names the example in errors.
        seconds: How long it may take.

    Raises:
        InputError: It failed, took longer, or returned something other than a number from 0 to 1; names the scorer and
            the example.
    """
    name = getattr(scorer, "__name__", repr(scorer))
    try:
        with _time_limit(seconds), _stdout_to_stderr(), _one_process():
            score = scorer(copy.deepcopy(dict(record)), text)
    except _TimeLimitError as error:
        raise InputError(
            f"the scorer `{name}` took more than {seconds:g} s for example {example_id}; make it faster, or raise "
            "evaluation.scorer_seconds"
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit: it is the scorer's, not ours
        place = traceback.extract_tb(error.__traceback__, limit=2)[-1]  # the line of the scorer, not of what it called
        raise InputError(
            f"{place.filename}:{place.lineno}: the scorer `{name}` failed for example {example_id}: "
            f"{type(error).__name__}: {error}"
        ) from error
    number = _number(score)
    if number is None or not 0.0 <= number <= 1.0:
        raise InputError(
            f"the scorer `{name}` returned {score!r} for example {example_id}; it must return a number from 0 to 1"
        )
    return number


def _number(score: Any) -> float | None:
    """A number of whatever library; None for anything else."""
    if score is None or isinstance(score, str | bytes):
        return None
    try:
        return float(score)
    except Exception:  # whatever its __float__ raises; OverflowError of a huge whole number
        return None


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Ends children that a scorer forked and that come out of the block: they must not go on as a second rank."""
    process = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != process:
            os._exit(0)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """For whatever writes in the block: Python's print, C's printf, and child processes."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    kept = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        libc.fflush(None)
        os.dup2(kept, _STDOUT)
        os.close(kept)


class _TimeLimitError(BaseException):
    """Not an Exception, so that a scorer does not catch it."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises in the block after so many seconds, as soon as Python runs again; on the main thread alone.

    A call of C that has not come back to Python after as long again ends the process, and its stack goes to stderr.
    """
    if not math.isfinite(seconds) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise _TimeLimitError

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + max(seconds, _LEAST_GRACE_SECONDS), exit=True, file=_STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
