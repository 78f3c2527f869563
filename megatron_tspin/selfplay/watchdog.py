"""Notices that a rank of a stage stands still, and says which one and where.

A rank that hangs makes all others wait for it in their next collective, so that soon all stand still. The one to name
is the one whose process is stopped, else one that does not say where it is, else one that is in no collective, else
the one with fewer beats.
"""

import re
import signal
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from traceback import FrameSummary

from megatron_tspin.config_launch import LaunchSection
from megatron_tspin.errors import HangError
from megatron_tspin.heartbeat import STACK_SIGNAL, Beat, read_beats, stack_file
from megatron_tspin.log import LOG_FILE_VARIABLE
from megatron_tspin.lost_rank import is_collective, place
from megatron_tspin.run_folder import beats_folder, rank_logs

_STACK_SECONDS = 3.0
_STATES = {
    "T": "is stopped (by SIGSTOP, or a shell's Ctrl-Z)",
    "t": "is stopped by a debugger",
    "Z": "has ended",
    "D": "waits for a disk or a device",
}
_STACK_LINE = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>.+)$', re.MULTILINE)


@dataclass
class _Seen:
    """A rank's last beat, and for how long it has not changed while somebody looked."""

    beat: Beat
    still: float = 0.0


@dataclass(frozen=True)
class _Place:
    """A rank that stands still."""

    seen: _Seen
    state: str | None
    """One of `_STATES`, if the process is in one."""
    stack: Sequence[FrameSummary]
    """Innermost last; empty if the rank does not answer."""

    @property
    def waits(self) -> bool:
        """Whether it is in a collective."""
        return any(map(is_collective, self.stack))


class Watchdog:
    """Looks after the ranks of a running stage.

    Args:
        log_file: The stage's, beside which its ranks say what they do.
        settings: How long they may stand still.
        send: Sends a signal to all of them.
    """

    def __init__(self, log_file: Path, settings: LaunchSection, send: Callable[[signal.Signals], bool]) -> None:
        self._folder, self._log_file, self._settings, self._send = beats_folder(log_file), log_file, settings, send
        self._seen: dict[int, _Seen] = {}

    def look(self, passed: float) -> None:
        """Compares with the last look.

        Args:
            passed: Seconds since then, of which this process was running: had it been suspended, with its ranks or
                without them, that time does not count.

        Raises:
            HangError: A rank stands still for too long.
        """
        for beat in read_beats(self._folder):
            seen = self._seen.get(beat.rank)
            if seen is None or seen.beat != beat:
                self._seen[beat.rank] = _Seen(beat)
            else:
                seen.still += passed
        late = [seen for seen in self._seen.values() if seen.still > self._limit(seen.beat)]
        if late:
            raise HangError(self._explain(min(late, key=lambda seen: self._limit(seen.beat))))

    def _limit(self, beat: Beat) -> float:
        if beat.kind == "step":
            return self._settings.hang_seconds
        if beat.kind == "waiting" and any(seen.beat.kind != "waiting" for seen in self._seen.values()):
            return float("inf")  # for somebody who has a limit
        return self._settings.long_hang_seconds

    def _explain(self, late: _Seen) -> str:
        places = self._places()
        blamed = _blamed(places)
        limit = "hang_seconds" if late.beat.kind == "step" else "long_hang_seconds"
        lines = [_described(each) for each in blamed]
        others = [each for each in places if each not in blamed and each.waits]
        if others:
            lines.append(f"{_wait(others)} in {place(others[0].stack)}")
        lines.append(f"launch.{limit} is {self._limit(late.beat):g} s; raise it if that was to be expected")
        return "\n".join(lines)

    def _places(self) -> list[_Place]:
        """Where the ranks are; in which state a process is can only be seen on this host."""
        here = [seen.beat for seen in self._seen.values() if is_rank_of(seen.beat, self._log_file)]
        states = {beat.rank: _state(beat.pid) for beat in here}
        self._send(STACK_SIGNAL)
        stacks = self._stacks(rank for rank in self._seen if states.get(rank) != "T")
        everyone = sorted(self._seen.values(), key=lambda seen: seen.beat.rank)
        return [_Place(seen, states.get(seen.beat.rank), stacks.get(seen.beat.rank, ())) for seen in everyone]

    def _stacks(self, ranks: Iterable[int]) -> dict[int, Sequence[FrameSummary]]:
        wanted, found = set(ranks), dict[int, Sequence[FrameSummary]]()
        deadline = time.monotonic() + _STACK_SECONDS
        while wanted - set(found) and time.monotonic() < deadline:
            time.sleep(0.1)
            for rank in wanted - set(found):
                with suppress(OSError):
                    if stack := read_stack(stack_file(self._folder, rank).read_text(encoding="utf-8")):
                        found[rank] = stack
        return found


def forget_beats(log_file: Path) -> None:
    """Of an earlier attempt, or of a stage that ended well; the ranks' logs stay, but for empty ones."""
    folder = beats_folder(log_file)
    kept = rank_logs(folder)
    for path in folder.glob("rank_*"):
        if path not in kept:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def ranks_here(log_file: Path) -> list[int]:
    """Process ids of the ranks of the stage with this log that run on this host."""
    return [beat.pid for beat in read_beats(beats_folder(log_file)) if is_rank_of(beat, log_file)]


def read_stack(text: str) -> list[FrameSummary]:
    """The main thread's frames, innermost last, of what faulthandler wrote; none if it did not write yet."""
    threads = text.split("\n\n")
    main = next((thread for thread in reversed(threads) if "megatron_tspin" in thread), threads[-1])
    lines = [FrameSummary(found["file"], int(found["line"]), found["name"]) for found in _STACK_LINE.finditer(main)]
    return lines[::-1]


def is_rank_of(beat: Beat, log_file: Path) -> bool:
    """Whether the rank lives on this host: its process id may be another process's by now."""
    if beat.host != socket.gethostname():
        return False
    try:
        environment = Path(f"/proc/{beat.pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"{LOG_FILE_VARIABLE}={log_file}".encode() in environment


def _state(pid: int) -> str | None:
    try:
        letter = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
    return letter if letter in _STATES else None


def _blamed(places: Sequence[_Place]) -> list[_Place]:
    """Those that the others wait for, as far as can be told."""
    reasons = (
        [each for each in places if each.state in ("T", "t", "Z")],
        [each for each in places if each.state is not None],
        [each for each in places if not each.stack and any(other.stack for other in places)],
        [each for each in places if each.stack and not each.waits],
    )
    for found in reasons:
        if found:
            return found
    working = [each for each in places if each.seen.beat.kind != "waiting"] or list(places)
    fewest = min(each.seen.beat.count for each in working)
    return [each for each in working if each.seen.beat.count == fewest]


def _described(each: _Place) -> str:
    beat = each.seen.beat
    what = "does not say where it is"
    if each.state is not None:
        what = _STATES[each.state]
    elif each.stack:
        what = f"is in {place(each.stack)}"
    since = f"has been standing still for {each.seen.still:.0f} s in `{beat.doing}`"
    return f"rank {beat.rank} {since}: process {beat.pid} on {beat.host} {what}"


def _wait(places: Sequence[_Place]) -> str:
    ranks = ", ".join(str(each.seen.beat.rank) for each in places)
    return f"rank {ranks} waits" if len(places) == 1 else f"ranks {ranks} wait"
