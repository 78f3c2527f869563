"""What each rank of a stage does now, in a small file of its own, for whoever watches from outside.

The file is written by the loop itself, not by a thread beside it, so a rank that stands still stops writing. Whoever
watches compares what it reads with what it read before; no clock of another host takes part.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

Kind = Literal["step", "busy", "waiting"]
"""How long a rank may stay where it is.

step: An optimizer step, a token of a batch, a tensor of a conversion: seconds.
busy: It starts, reads, writes, hashes or compares: may take long.
waiting: It waits for other ranks, however long these take.
"""

STACK_SIGNAL = signal.SIGUSR2
"""Makes a rank write where it is into its stack file, whatever it is doing."""

_FILE_BYTES = 512  # written in place and whole, so that a beat costs one system call


@dataclass(frozen=True)
class Beat:
    """Where a rank is."""

    rank: int
    pid: int
    host: str
    count: int
    """Beats so far: of ranks that do the same, the one with fewer is behind."""
    doing: str
    """For people, e.g. `train iteration 0, step 12`."""
    kind: Kind


class _Heart:
    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = beat_file(folder, rank)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._stack = stack_file(folder, rank).open("w", encoding="utf-8")
        faulthandler.register(STACK_SIGNAL, file=self._stack, all_threads=True)
        self.beat = Beat(rank, os.getpid(), socket.gethostname(), 0, "starting", "busy")
        self.write(self.beat)

    def write(self, beat: Beat) -> None:
        self.beat = replace(beat, count=self.beat.count + 1)
        text = json.dumps(asdict(self.beat))
        if len(text) > _FILE_BYTES:
            text = json.dumps(asdict(replace(self.beat, doing=self.beat.doing[:60])))
        with suppress(OSError):  # a disk that is full or away: what the stage itself writes there will say so
            os.pwrite(self._descriptor, text.ljust(_FILE_BYTES).encode(), 0)


_heart: _Heart | None = None


def start_beating(folder: Path, rank: int) -> None:
    """From now on this process writes its beats into a folder, which other ranks use too."""
    global _heart
    try:
        _heart = _Heart(folder, rank)
    except OSError as error:
        sys.stderr.write(f"tspin: {folder}: {error.strerror}; the driver will not notice if this rank hangs\n")


def beat(doing: str | None = None) -> None:
    """Says that this rank goes on, within a step.

    Args:
        doing: What begins now; None for the next part of the same.
    """
    if _heart is not None:
        _heart.write(replace(_heart.beat, doing=doing or _heart.beat.doing, kind="step"))


@contextmanager
def busy(doing: str) -> Iterator[None]:
    """Around what may take long on this rank."""
    with _during(doing, "busy"):
        yield


@contextmanager
def waiting(doing: str) -> Iterator[None]:
    """Around what takes as long as other ranks take."""
    with _during(doing, "waiting"):
        yield


@contextmanager
def _during(doing: str, kind: Kind) -> Iterator[None]:
    """On a failure the rank stays where it was, so that the last beat tells where that is."""
    if _heart is None:
        yield
        return
    before = _heart.beat
    _heart.write(replace(before, doing=doing, kind=kind))
    yield
    _heart.write(before)


def beat_file(folder: Path, rank: int) -> Path:
    """Where a rank's beats are."""
    return folder / f"rank_{rank:05d}.json"


def stack_file(folder: Path, rank: int) -> Path:
    """Where a rank writes its stack when it gets `STACK_SIGNAL`."""
    return folder / f"rank_{rank:05d}.stack"


def read_beats(folder: Path) -> list[Beat]:
    """The last beat of every rank, in order; of a rank whose file was caught in the middle of a beat there is none."""
    found = []
    for path in sorted(folder.glob("rank_*.json")):
        with suppress(OSError, ValueError, TypeError):
            found.append(Beat(**json.loads(path.read_text(encoding="utf-8"))))
    return found
