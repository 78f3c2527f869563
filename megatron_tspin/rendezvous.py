"""What keeps ranks from finding each other, said in seconds and in one line.

torch finds these faults too, but most of them after minutes, and tells them by a line of its C++.
"""

import errno
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address

from megatron_tspin.errors import InputError, LostRankError, StageError, TspinError
from megatron_tspin.log import get_logger

_LATE_SECONDS = 10.0
_RESOLVE_SECONDS = 5.0
_RESOLVE_PAUSE_SECONDS = 0.5
_MOST_PORT = 65535
_NO_ADDRESS = re.compile(r"Unable to find address for: *(\S+)")
_IN_USE = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
_REFUSED_BY = re.compile(r"Connection refused, remote=\[([^\]]+)\]")
_OF_OTHERS = re.compile(
    r"timed out|timeout|refused|reset|closed by|broken pipe|clients joined|ping failed", re.IGNORECASE
)
_SOURCE_LINES = re.compile(r"\[[^\s\[\]]+:\d+\] ")  # of torch's and gloo's sources

_log = get_logger(__name__)


def check_rendezvous(backend: str) -> None:
    """Refuses settings of the environment by which this rank cannot meet the others.

    Args:
        backend: Of torch.distributed, `gloo` or `nccl`.

    Raises:
        InputError: Names the variable, its value, this rank and host, and the remedy.
    """
    if int(os.environ["WORLD_SIZE"]) == 1:
        return
    address, port = _required("MASTER_ADDR"), _port(_required("MASTER_PORT"))
    _check_resolves(address)
    if os.environ.get("RANK") == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _check_free(port)
    _check_interfaces(backend)


@contextmanager
def meeting(backend: str, late_seconds: float = _LATE_SECONDS) -> Iterator[None]:
    """Around torch's rendezvous: says once who waits for whom if it takes long, and in one line how it failed.

    A rank that is waited for may only be late, so this ends nothing. A thread watches the clock, because a connection
    made to see who is there could get in the way of the store. What comes early matters: for a rank that never
    connects, gloo of torch 2.13 waits five times as long as it is told to.

    Args:
        backend: As in `check_rendezvous`.
        late_seconds: When to say that others are late.

    Raises:
        InputError: A setting is at fault; names it and the remedy.
        LostRankError: Another rank did not come.
        StageError: torch failed in another way.
    """
    if int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    began = time.monotonic()
    others = "the others" if os.environ.get("RANK") == "0" else "rank 0 and the others"
    said = (
        f"{_this_rank()} waits for {others} at {_place()} since {time.strftime('%H:%M:%S')}, {late_seconds:g} s by now"
    )
    timer = threading.Timer(late_seconds, lambda: _log.warning("%s%s", said, _own_name_at_fault(backend)))
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:  # which torch's own errors are
        raise _explained(str(error), backend, time.monotonic() - began) from error
    finally:
        timer.cancel()


def _this_rank() -> str:
    return f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} on host {socket.gethostname()}"


def _place() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _refusal(problem: str, remedy: str) -> InputError:
    return InputError(f"{_this_rank()}: {problem}; {remedy}")


def _required(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise _refusal(
            f"{name} is not set", "set it to where rank 0 is, the same on all ranks, or start them by torchrun"
        )
    return value


def _port(text: str) -> int:
    """As torch reads it. 0 is any port, which only a process alone can meet at."""
    with suppress(ValueError):
        if 1 <= int(text) <= _MOST_PORT:
            return int(text)
    raise _refusal(
        f"MASTER_PORT = {text!r} is not a port", f"set it to a number from 1 to {_MOST_PORT}, the same on all ranks"
    )


def _check_resolves(address: str) -> None:
    """For some seconds, as torch does for minutes: some clusters know a host's name only once it is up."""
    deadline = time.monotonic() + _RESOLVE_SECONDS
    while True:
        try:
            socket.getaddrinfo(os.fsencode(address), None)  # bytes: Python has rules of its own for text
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise _refusal(
                    f"MASTER_ADDR = {address!r} does not resolve ({error.strerror})",
                    "set it to a name or an address of rank 0's host that every node knows",
                ) from None
        time.sleep(_RESOLVE_PAUSE_SECONDS)


def _check_free(port: int) -> None:
    """Binds as torch's store does. It does not listen: a rank that is early would take this for the store."""
    try:
        with socket.socket(socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _port_in_use() from None
        if error.errno == errno.EACCES:
            raise _refusal(f"MASTER_PORT = {port} may not be opened by this user", "choose one above 1024") from None
        # Anything else, torch knows better: it also tries IPv6.


def _port_in_use() -> InputError:
    return _refusal(
        f"MASTER_PORT = {os.environ['MASTER_PORT']} is in use by another process",
        "set MASTER_PORT to a free one, the same on all ranks (`ss -tan` lists those in use, "
        "`torchrun --standalone` finds one by itself)",
    )


def _check_interfaces(backend: str) -> None:
    name = f"{backend.upper()}_SOCKET_IFNAME"
    wanted, there = os.environ.get(name, ""), _interfaces()
    if len(wanted) <= 1 or backend not in _CHOOSE:  # both backends ignore a value of one character
        return
    if not _CHOOSE[backend](wanted, there):
        raise _refusal(
            f"{name} = {wanted!r} names a network interface that this host does not have",
            f"set it to one that is there ({', '.join(there)}), or unset it",
        )


def _of_gloo(wanted: str, there: list[str]) -> bool:
    """Every name has to be there: torch makes a device of each. It does not see an empty one at the end."""
    return set(wanted.removesuffix(",").split(",")) <= set(there)


def _of_nccl(wanted: str, there: list[str]) -> bool:
    """Prefixes; `^` in front excludes, `=` after it asks for whole names.

    NCCL's source (findInterfaces, parseStringList) also lets a name end with `:port`, and skips empty names.
    """
    excludes, rest = wanted.startswith("^"), wanted.removeprefix("^")
    whole, rest = rest.startswith("="), rest.removeprefix("=")
    names = [name for part in rest.split(",") if (name := part.partition(":")[0])]
    matched = [each for each in there if not names or (each in names if whole else each.startswith(tuple(names)))]
    return len(matched) < len(there) if excludes else bool(matched)


_CHOOSE: dict[str, Callable[[str, list[str]], bool]] = {"gloo": _of_gloo, "nccl": _of_nccl}


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _ways_out() -> str:
    return ", ".join(name for name in _interfaces() if name != "lo")


def _explained(message: str, backend: str, seconds: float) -> TspinError:
    """What to tell a person about an error of torch's rendezvous."""
    reason = _SOURCE_LINES.sub("", message.strip().split("\n")[0])
    nameless, refused = _NO_ADDRESS.search(message), _REFUSED_BY.search(message)
    if nameless:
        return _refusal(
            f"GLOO_SOCKET_IFNAME = {os.environ.get('GLOO_SOCKET_IFNAME')!r}: interface {nameless[1]} has no address",
            f"set it to one that has ({', '.join(_interfaces())})",
        )
    if os.environ.get("RANK") == "0" and _IN_USE.search(message):  # taken since it was checked
        return _port_in_use()
    if refused and _is_loopback(refused[1]) and _gloo_goes_by_name(backend):
        return _refusal(
            f"another node gave its address as {refused[1]}, which leads nowhere from here: it takes its name for that",
            "set GLOO_SOCKET_IFNAME on every node to the interface that leads to the others (here one of "
            f"{_ways_out()}), or mend its /etc/hosts",
        )
    kind = LostRankError if _OF_OTHERS.search(message) else StageError
    return kind(f"{_this_rank()} did not meet the others at {_place()} in {seconds:.0f} s ({reason})")


def _gloo_goes_by_name(backend: str) -> bool:
    """Whether ranks of several nodes, as far as one can tell, find each other by what hosts take their own names for.

    Those "nodes" may be on one host, or the others may have addresses below 127: gloo connects from the higher address
    to the lower one. Then loopback works, which is why nothing is refused beforehand.
    """
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    several = here.isdecimal() and int(os.environ["WORLD_SIZE"]) > int(here)
    return backend == "gloo" and several and len(os.environ.get("GLOO_SOCKET_IFNAME", "")) <= 1


def _own_name_at_fault(backend: str) -> str:
    """A part of a sentence if gloo gives the other nodes a loopback address of this one, else nothing."""
    address = _address_by_name() if _gloo_goes_by_name(backend) else ""
    if not address or not _is_loopback(address):
        return ""
    return (
        f" (host {socket.gethostname()} takes its own name for {address}, where other hosts cannot reach it: if the "
        f"ranks are on several, set GLOO_SOCKET_IFNAME to one of {_ways_out()}, or mend /etc/hosts)"
    )


def _address_by_name() -> str:
    """As gloo chooses: the first address of the host's name that can be bound, else 127.0.0.1."""
    found: list[tuple[int, tuple[object, ...]]] = []
    with suppress(OSError):
        found = [
            (entry[0], entry[4])
            for entry in socket.getaddrinfo(os.fsencode(socket.gethostname()), None, type=socket.SOCK_STREAM)
        ]
    for family, address in found:
        with suppress(OSError), socket.socket(family) as probe:
            probe.bind(address)
            return str(address[0])
    return "127.0.0.1"


def _is_loopback(address: str) -> bool:
    with suppress(ValueError):
        return ip_address(address.partition("%")[0]).is_loopback
    return False
