"""Whether all nodes see one folder, can write into it, and respect each other's locks there."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_tspin.doctor.findings import Finding

_VISIBLE_SECONDS = 10.0
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_REMEDY = "put --run-dir on a file system that all nodes mount at the same path"


def probe_of(folder: Path, host: str) -> Path:
    """The file that a node writes for the others to see."""
    return folder / f"probe.{host}"


def write_probe(folder: Path) -> list[Finding]:
    """Writes this node's."""
    host = socket.gethostname()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe_of(folder, host).write_text(host, encoding="utf-8")
    except OSError as error:
        return [Finding(host, f"cannot write to {folder} ({error.strerror})", _REMEDY)]
    return []


def missing_probes(folder: Path, hosts: Sequence[str], seconds: float = _VISIBLE_SECONDS) -> list[Finding]:
    """The nodes whose probes this node does not see, though they have written them."""
    here, deadline = socket.gethostname(), time.monotonic() + seconds
    absent = list(hosts)
    while True:
        absent = [host for host in absent if not _is_there(probe_of(folder, host))]
        if not absent or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return [Finding(here, f"does not see what {host} has written to {folder}", _REMEDY) for host in absent]


def _is_there(path: Path) -> bool:
    """Opened, because only that asks a network file system anew."""
    try:
        with path.open("rb"):
            return True
    except OSError:
        return False


@contextmanager
def held_lock(path: Path) -> Iterator[bool]:
    """Holds a lock of the kind that a run's driver holds; False where the file system has none."""
    with path.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            yield False
        else:
            yield True


def lock_findings(path: Path, holder: str) -> list[Finding]:
    """Whether this node respects a lock that another one holds; where it does not, a run's lease has to do."""
    here = socket.gethostname()
    try:
        with path.open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return []
    except OSError as error:
        return [] if error.errno in _NO_FLOCK else [Finding(here, f"{path}: {error.strerror}", _REMEDY)]
    return [Finding(here, f"does not see a lock that {holder} holds on {path}", "never start two drivers", fatal=False)]


def remove_probes(folder: Path) -> None:
    """Removes what the probing has left."""
    for path in folder.glob("probe.*"):
        with suppress(OSError):
            path.unlink()
    with suppress(OSError):
        os.rmdir(folder)
