"""One driver a run: a lock that the driver and its stages hold for as long as any of them lives, and a lease in it.

The kernel's lock (flock) is dropped with the last process that has it, so nothing stale can stay behind. It belongs to
a file, though, and whoever removes the file of a running driver lets a second one in. So the file also holds a lease
with a random token: a driver commits nothing once the run's lock file is not its own any more. Where the file system
knows no flock (ENOSYS and the like), the lease alone decides, by the owner's process on the same host, else by its age.
"""

import datetime
import errno
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger

LEASE_SECONDS = 300.0
"""Without flock, a lease of another host that was not renewed for so long is over."""
_GRACE_SECONDS = 60.0
_POLL_SECONDS = 0.2
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)

logger = get_logger(__name__)


@dataclass(frozen=True)
class RunLock:
    """A run that this process holds."""

    descriptor: int
    """Of the lock file; stages inherit it, so that they hold the run too."""
    path: Path
    token: str

    def check(self) -> None:
        """Demands that the run is still this process's; to be called before anything is declared done.

        Raises:
            InputError: The lock file was removed or replaced; says who has the run.
            OSError: The file system does not answer, which tells nothing.
        """
        try:
            entry, own = self.path.stat(), os.fstat(self.descriptor)
            content = _parsed(self.path.read_bytes())
        except FileNotFoundError:
            raise InputError(
                f"{self.path}: was removed under this driver, which ends, as another one may have the run now; run the "
                "same command again"
            ) from None
        if (entry.st_dev, entry.st_ino) != (own.st_dev, own.st_ino) or content.get("token") != self.token:
            raise InputError(
                f"{_refusal(self.path.parent, content)}; its lock file was taken from this driver, which ends"
            )

    def renew(self) -> None:
        """Says that the owner lives; the file's time of change is the lease's."""
        os.utime(self.descriptor)


@contextmanager
def run_lock(run_dir: Path, grace_seconds: float = _GRACE_SECONDS) -> Iterator[RunLock]:
    """Holds the run.

    When the owner is dead but one of its stages still ends, this waits up to `grace_seconds`.

    Raises:
        InputError: Another driver has the run; names its process and host.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _acquire(descriptor, run_dir, grace_seconds)
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "job": os.environ.get("SLURM_JOB_ID"),
            "token": secrets.token_hex(16),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode("utf-8"), 0)
        lock = RunLock(descriptor, path, str(owner["token"]))
        lock.check()  # two that opened two files of one name: the one whose file is gone is not the owner
        try:
            yield lock
        finally:
            _hand_back(lock)
    finally:
        os.close(descriptor)


def holder(run_dir: Path) -> dict[str, Any] | None:
    """Who has the run (`pid`, `host`, `since`, `job`); None if nobody does, as far as this host can tell."""
    path = run_dir / ".lock"
    try:
        owner, age = _parsed(path.read_bytes()), time.time() - path.stat().st_mtime
    except OSError:
        return None
    if owner.get("host") == socket.gethostname():
        return None if _is_dead(owner) else owner
    return owner if owner and age < LEASE_SECONDS else None


def _acquire(descriptor: int, run_dir: Path, grace_seconds: float) -> None:
    """Takes the lock; where the file system has none, the lease alone counts."""
    deadline = time.monotonic() + grace_seconds
    waiting = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            owner = _owner(descriptor)
            if not _is_dead(owner) or time.monotonic() > deadline:
                raise InputError(_refusal(run_dir, owner)) from error
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            _take_lease(descriptor, run_dir, error)
            return
        if not waiting:
            logger.info("%s: its former driver is gone, waiting for the stage it started to end", run_dir)
            waiting = True
        time.sleep(_POLL_SECONDS)


def _take_lease(descriptor: int, run_dir: Path, reason: OSError) -> None:
    """Where there is no flock: refuses while somebody else's lease runs."""
    logger.warning(
        "%s: this file system has no file locks (%s); the lease in .lock has to do", run_dir, reason.strerror
    )
    owner = _owner(descriptor)
    age = time.time() - os.fstat(descriptor).st_mtime
    elsewhere = owner.get("host") != socket.gethostname()
    if owner and not _is_dead(owner) and (not elsewhere or age < LEASE_SECONDS):
        until = f"; its lease ends {LEASE_SECONDS - age:.0f} s from now unless it renews it" if elsewhere else ""
        raise InputError(_refusal(run_dir, owner) + until)


def _hand_back(lock: RunLock) -> None:
    """A lease that is over is nobody's: another host need not wait for its age, nor take the run for a running one."""
    with suppress(InputError):
        lock.check()
        os.ftruncate(lock.descriptor, 0)


def _owner(descriptor: int) -> dict[str, Any]:
    """Who holds the lock; empty in the moment between locking and writing the name."""
    return _parsed(os.pread(descriptor, 4096, 0))


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(content)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether the driver that took the lock ended, as far as this host can tell."""
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return False
    return not Path(f"/proc/{owner['pid']}").exists()


def _refusal(run_dir: Path, owner: dict[str, Any]) -> str:
    if _is_dead(owner):
        return (
            f"{run_dir}: a stage that process {owner['pid']} (gone) on {owner['host']} started still runs; "
            "end it, then run this command again"
        )
    return (
        f"{run_dir}: in use by process {owner.get('pid', 'unknown')} on host {owner.get('host', 'unknown')} "
        f"since {owner.get('since', 'just now')}; wait until it ends, or use another --run-dir"
    )
