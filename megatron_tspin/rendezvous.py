"""What keeps ranks from finding each other, said in seconds and in one line.

torch finds these faults too, but after minutes, and tells them by a line of its C++.
"""

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address

from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger

_PATIENCE_SECONDS = 10.0
_MOST_PORT = 65535

_log = get_logger(__name__)


def check_rendezvous(backend: str) -> None:
    """Refuses settings of the environment by which this rank cannot meet the others.

    Args:
        backend: Of torch.distributed, `gloo` or `nccl`.

    Raises:
        InputError: Names the variable, its value, this host and the remedy.
    """
    if int(os.environ["WORLD_SIZE"]) == 1:
        return
    address, port = _required("MASTER_ADDR"), _port(_required("MASTER_PORT"))
    _check_resolves(address)
    if os.environ.get("RANK") == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and port:
        _check_free(port)
    _check_interfaces(backend)
    if backend == "gloo" and _several_nodes():
        _check_own_address()


def this_rank() -> str:
    """This process, for people."""
    return f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} on host {socket.gethostname()}"


def meeting_place() -> str:
    """Where the ranks meet."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


@contextmanager
def said_when_late(seconds: float = _PATIENCE_SECONDS) -> Iterator[None]:
    """Around the rendezvous: if it takes long, says who waits, and where. Rank 0 may only be late, so it goes on."""
    arguments = (this_rank(), seconds, meeting_place())
    timer = threading.Timer(seconds, _log.warning, ("%s has waited %g s for the others at %s so far", *arguments))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _required(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise InputError(f"{name} is not set, and {os.environ['WORLD_SIZE']} ranks need it to find each other")
    return value


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > _MOST_PORT:
        raise InputError(f"MASTER_PORT = {text!r}: not a port (1 to {_MOST_PORT})")
    return int(text)


def _check_resolves(address: str) -> None:
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise InputError(
            f"MASTER_ADDR = {address!r} does not resolve on host {socket.gethostname()} ({error.strerror}); set it to "
            "a name or an address of rank 0's host that every node knows"
        ) from None


def _check_free(port: int) -> None:
    """As torch's store does: on all addresses."""
    try:
        with socket.socket(socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            probe.listen(1)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            return  # torch will know better
        taken = "is in use by another process" if error.errno == errno.EADDRINUSE else "may not be opened by this user"
        raise InputError(
            f"MASTER_PORT = {port} {taken} on host {socket.gethostname()}; set MASTER_PORT to a free one, the same on "
            "all ranks"
        ) from None


def _check_interfaces(backend: str) -> None:
    name = f"{backend.upper()}_SOCKET_IFNAME"
    wanted = os.environ.get(name)
    if not wanted:
        return
    there = _interfaces()
    if not _CHOOSE[backend](wanted, there):
        raise InputError(
            f"{name} = {wanted!r} names no network interface of host {socket.gethostname()}; it has {', '.join(there)}"
        )


def _of_gloo(wanted: str, there: list[str]) -> bool:
    """Every name has to be there: torch makes a device of each (ProcessGroupGloo)."""
    return set(wanted.split(",")) <= set(there)


def _of_nccl(wanted: str, there: list[str]) -> bool:
    """Prefixes; `=` asks for whole names, `^` excludes (NCCL's manual, NCCL_SOCKET_IFNAME)."""
    excludes, whole = wanted.startswith("^"), wanted.lstrip("^").startswith("=")
    names = wanted.lstrip("^").lstrip("=").split(",")
    matched = [each for each in there if each in names or (not whole and each.startswith(tuple(names)))]
    return len(matched) < len(there) if excludes else bool(matched)


_CHOOSE: dict[str, Callable[[str, list[str]], bool]] = {"gloo": _of_gloo, "nccl": _of_nccl}


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _several_nodes() -> bool:
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return here.isdecimal() and int(os.environ["WORLD_SIZE"]) > int(here)


def _check_own_address() -> None:
    """Gloo tells the other nodes the address that this host's own name has here."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    host = socket.gethostname()
    remedy = (
        f"set GLOO_SOCKET_IFNAME to the interface that leads to the other nodes ({', '.join(_interfaces())}), or mend "
        "/etc/hosts"
    )
    try:
        found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        raise InputError(f"host {host} does not know its own name, by which gloo finds its address; {remedy}") from None
    if all(ip_address(address).is_loopback for address in found):
        raise InputError(f"host {host} takes its own name for {', '.join(sorted(found))}; {remedy}")
