"""One driver a run: a lock that the driver and its stages hold for as long as any of them lives."""

import datetime
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger

_GRACE_SECONDS = 60.0
_POLL_SECONDS = 0.2

logger = get_logger(__name__)


@contextmanager
def run_lock(run_dir: Path, grace_seconds: float = _GRACE_SECONDS) -> Iterator[int]:
    """Holds the run; yields the lock's descriptor, which stages inherit so that they hold it too.

    The kernel drops the lock with the last process that has it, so nothing stale can stay behind. When the owner is
    dead but one of its stages still ends, this waits up to `grace_seconds`.

    Raises:
        InputError: Another driver has the run; names its process and host.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _acquire(descriptor, run_dir, grace_seconds)
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode("utf-8"), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, run_dir: Path, grace_seconds: float) -> None:
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
        if not waiting:
            logger.info("%s: its former driver is gone, waiting for the stage it started to end", run_dir)
            waiting = True
        time.sleep(_POLL_SECONDS)


def _owner(descriptor: int) -> dict[str, Any]:
    """Who holds the lock; empty in the moment between locking and writing the name."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
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
