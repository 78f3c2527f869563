"""Ranks that cannot meet say why, in one line and within seconds."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from megatron_tspin import rendezvous
from megatron_tspin.errors import InputError, LostRankError, StageError, TspinError
from megatron_tspin.rendezvous import check_rendezvous, meeting

PROGRAM = Path(__file__).with_name("meeting_rank.py")
HOST = socket.gethostname()
NODE_SETTINGS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE")
NOT_REACHED = (
    "Gloo connectFullMesh failed with [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:152] timed out "
    "connecting: SO_ERROR: Connection refused, remote=[{address}]:47016$1"
)
"""What gloo of torch 2.13 said between two network namespaces whose hosts' names were 127.0.1.1."""


@pytest.fixture(autouse=True)
def second_of_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NODE_SETTINGS, "TSPIN_LOG_FILE"):
        monkeypatch.delenv(name, raising=False)
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)


@contextmanager
def taken_port(address: str = "") -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind((address, 0))
        taken.listen(1)
        yield str(taken.getsockname()[1])


def own_name(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Makes this host take its name for these addresses; for none, it does not know it."""
    real = socket.getaddrinfo

    def resolve(host: bytes | str, *rest: object, **named: object) -> object:
        if os.fsdecode(host) != HOST:
            return real(host, None)
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", resolve)


def refusal(backend: str = "gloo", seconds: float = 10.0) -> str:
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        check_rendezvous(backend)
    assert time.monotonic() - began < seconds
    assert str(caught.value).startswith(f"rank {os.environ['RANK']} of 2 on host {HOST}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MASTER_ADDR", "", "MASTER_ADDR is not set; set it"),
        ("MASTER_PORT", "", "MASTER_PORT is not set; set it"),
        ("MASTER_PORT", "http", "MASTER_PORT = 'http' is not a port; set it to a number from 1 to 65535"),
        ("MASTER_PORT", "70000", "MASTER_PORT = '70000' is not a port"),
        ("MASTER_PORT", "-1", "MASTER_PORT = '-1' is not a port"),
        ("MASTER_PORT", "0", "MASTER_PORT = '0' is not a port"),
        ("MASTER_ADDR", "a..b", "MASTER_ADDR = 'a..b' does not resolve ("),
        ("GLOO_SOCKET_IFNAME", "absent0", "GLOO_SOCKET_IFNAME = 'absent0' names a network interface that this host"),
        ("GLOO_SOCKET_IFNAME", "lo,absent0", "set it to one that is there (lo"),
        ("GLOO_SOCKET_IFNAME", "l", ""),
        ("GLOO_SOCKET_IFNAME", "lo,", ""),
        ("NCCL_SOCKET_IFNAME", "absent0", ""),
        ("MASTER_PORT", " 29500 ", ""),
    ],
)
def test_settings_are_named(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_RESOLVE_SECONDS", 0.0)
    monkeypatch.setattr(rendezvous, "_interfaces", lambda: ["lo", "eth0"])
    monkeypatch.setenv(name, value)
    if message:
        assert message in refusal()
    else:  # it works in torch, or gloo does not read it
        check_rendezvous("gloo")


def test_a_name_that_does_not_resolve_is_named_within_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "no-such-host.invalid."
    began = time.monotonic()
    with pytest.raises(OSError):
        socket.getaddrinfo(name, None)
    resolver_seconds = time.monotonic() - began  # where no name server answers, it alone takes more than ten
    monkeypatch.setenv("MASTER_ADDR", name)
    monkeypatch.setattr(rendezvous, "_RESOLVE_SECONDS", 0.3)
    monkeypatch.setattr(rendezvous, "_RESOLVE_PAUSE_SECONDS", 0.1)
    assert f"MASTER_ADDR = {name!r} does not resolve (" in refusal(seconds=10 + 4 * resolver_seconds)


def test_a_name_may_become_known_a_little_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods of a cluster get their names when they are up. torch asks again, too."""
    answers: Iterator[object] = iter([socket.gaierror(socket.EAI_NONAME, "not known"), []])

    def resolve(*asked: object) -> object:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(rendezvous, "_RESOLVE_PAUSE_SECONDS", 0.01)
    check_rendezvous("gloo")
    assert not list(answers)


@pytest.mark.parametrize("address", ["", "127.0.0.1"])
def test_a_port_in_use_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with taken_port(address) as port:
        monkeypatch.setenv("MASTER_PORT", port)
        check_rendezvous("gloo")  # others than rank 0 find it open
        monkeypatch.setenv("RANK", "0")
        assert f"MASTER_PORT = {port} is in use by another process; set MASTER_PORT to a free one" in refusal()
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # it is torchrun's
        check_rendezvous("gloo")


def test_looking_at_the_port_leaves_it_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with socket.socket() as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ours.bind(("", 0))  # nobody else gets it meanwhile, but who asks as torch does
        monkeypatch.setenv("MASTER_PORT", str(ours.getsockname()[1]))
        check_rendezvous("gloo")
        ours.listen(1)


@pytest.mark.parametrize(
    ("value", "fits"),
    [("eth", True), ("=eth", False), ("=eth0", True), ("ib", False), ("ib,lo", True), ("^lo,docker", True),
     ("^=lo", True), ("^lo,eth", False), ("ib,", False), ("^lo,", True), ("=eth0:5000", True)],
)  # fmt: skip
def test_interfaces_as_nccl_reads_them(value: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_interfaces", lambda: ["lo", "eth0"])
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
    if fits:
        check_rendezvous("nccl")
    else:
        assert f"NCCL_SOCKET_IFNAME = {value!r} names" in refusal("nccl")


def failed_with(message: str, backend: str = "gloo") -> TspinError:
    """What becomes of an error of torch's rendezvous."""
    with pytest.raises(TspinError) as caught, meeting(backend):
        raise RuntimeError(message)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_node_that_others_cannot_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_interfaces", lambda: ["lo", "eth0"])
    unreached = NOT_REACHED.format(address="127.0.1.1")
    assert isinstance(failed_with(unreached), LostRankError)  # nobody said that there are several nodes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    refused = failed_with(unreached)
    assert isinstance(refused, InputError) and f"on host {HOST}: another node gave its address as 127.0.1.1" in str(
        refused
    )
    assert "set GLOO_SOCKET_IFNAME on every node to the interface that leads to the others (here one of eth0)" in str(
        refused
    )
    assert isinstance(failed_with(NOT_REACHED.format(address="10.9.0.1")), LostRankError)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert isinstance(failed_with(unreached), LostRankError)


@pytest.mark.parametrize(
    ("addresses", "taken_for"),
    [((), "127.0.0.1"), (("127.0.0.1",), "127.0.0.1"), (("127.0.1.1", "127.0.0.1"), "127.0.1.1"),
     (("192.0.2.1",), "127.0.0.1"), (("0.0.0.0", "127.0.0.1"), None)],
)  # fmt: skip
def test_a_host_whose_own_name_is_loopback_is_told_only_when_ranks_are_late(
    addresses: tuple[str, ...],
    taken_for: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It may work: several "nodes" may be one host. 192.0.2.1 is nobody's (RFC 5737), 0.0.0.0 stands for a good one."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    own_name(monkeypatch, *addresses)
    check_rendezvous("gloo")
    for backend, expected in (("gloo", taken_for), ("nccl", None)):
        caplog.clear()
        late(backend, caplog)
        (said,) = caplog.messages
        assert (f"(host {HOST} takes its own name for {expected}, where" in said) == (expected is not None)


def late(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    """Meets after the warning."""
    with meeting(backend, 0.02):
        wait_for(lambda: bool(caplog.messages))
        time.sleep(0.1)  # it comes once


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_late_rank_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with meeting("gloo", 30.0):
        pass
    assert not caplog.messages
    late("gloo", caplog)
    (said,) = caplog.messages
    assert re.fullmatch(
        rf"rank 1 of 2 on host {re.escape(HOST)} waits for rank 0 and the others at 127\.0\.0\.1:29500 since "
        r"\d\d:\d\d:\d\d, 0\.02 s by now",
        said,
    )


def test_one_process_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_ADDR")
    check_rendezvous("gloo")
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="as it was"), meeting("gloo", 0.0):
        assert threading.active_count() == threads
        raise RuntimeError("as it was")


@pytest.mark.parametrize(
    ("rank", "message", "kind", "told"),
    [
        ("0", "The server socket has failed to listen. code: -98, name: EADDRINUSE", InputError, "29500 is in use by"),
        ("1", "[enforce fail at /w/device.cc:84] ifa != nullptr. Unable to find address for: ifb0", InputError,
         "GLOO_SOCKET_IFNAME = 'ifb0': interface ifb0 has no address; set it to"),
        ("0", "Timed out after 5 seconds waiting for clients. 1/2 clients joined.", LostRankError,
         "did not meet the others at 127.0.0.1:29500 in 0 s (Timed out after 5 seconds waiting"),
        ("1", "Gloo connectFullMesh failed with [/w/pair.h:311] Connect timeout [none]\nat /w/x.cpp", LostRankError,
         "in 0 s (Gloo connectFullMesh failed with Connect timeout [none])"),
        ("1", "no GPUs found!", StageError, "(no GPUs found!)"),
    ],
)  # fmt: skip
def test_errors_of_torch_become_one_line(
    rank: str, message: str, kind: type[TspinError], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ifb0")
    error = failed_with(message)
    assert type(error) is kind and told in str(error) and f"rank {rank} of 2 on host {HOST}" in str(error)


def start(patience_seconds: int = 60, **variables: str) -> "subprocess.Popen[str]":
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[1]), **variables}
    command = [sys.executable, str(PROGRAM), str(patience_seconds)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: "subprocess.Popen[str]") -> tuple[int, str, list[str]]:
    """(exit code, stdout, lines of ours on stderr) of a rank."""
    with process:
        try:
            out, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert "Traceback" not in errors
    return process.returncode, out, [line for line in errors.splitlines() if "tspin: " in line or " WARNING " in line]


@pytest.mark.processes
def test_a_rank_whose_rank_0_never_comes_ends_in_one_line() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and nobody listens there
        port = str(unused.getsockname()[1])
        code, _, (late, told) = end(start(1, MASTER_PORT=port))
    assert code == StageError.exit_code
    assert f" WARNING rank 1 of 2 on host {HOST} waits for rank 0 and the others at 127.0.0.1:{port} since " in late
    expected = f"tspin: error (rank 1): rank 1 of 2 on host {HOST} did not meet the others at 127.0.0.1:{port} in "
    assert told.startswith(expected) and re.search(r" in \d+ s \(.+\)$", told)


@pytest.mark.processes
def test_a_rank_0_whose_port_is_taken_ends_in_one_line() -> None:
    with taken_port() as port:
        code, _, (told,) = end(start(RANK="0", MASTER_PORT=port))
    assert code == InputError.exit_code
    assert told.startswith(f"tspin: error: rank 0 of 2 on host {HOST}: MASTER_PORT = {port} is in use by another ")


@pytest.mark.processes
def test_two_nodes_on_one_host_meet_whatever_it_takes_its_name_for(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent holds it
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    ranks = [start(RANK=str(rank), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1") for rank in range(2)]
    assert [end(rank)[:2] for rank in ranks] == [(0, f"rank {rank} met the other\n") for rank in range(2)]
