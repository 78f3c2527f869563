"""Ranks that cannot meet say why, in one line and within seconds."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_tspin import rendezvous
from megatron_tspin.errors import InputError
from megatron_tspin.rendezvous import check_rendezvous, said_when_late

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)


def refusal(backend: str = "gloo") -> str:
    with pytest.raises(InputError) as caught:
        check_rendezvous(backend)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MASTER_ADDR", "", "MASTER_ADDR is not set, and 2 ranks need it"),
        ("MASTER_PORT", "", "MASTER_PORT is not set, and 2 ranks need it"),
        ("MASTER_PORT", "http", "MASTER_PORT = 'http': not a port (1 to 65535)"),
        ("MASTER_PORT", "70000", "MASTER_PORT = '70000': not a port"),
        ("MASTER_ADDR", "no-such-host.invalid", "MASTER_ADDR = 'no-such-host.invalid' does not resolve on host "),
        ("GLOO_SOCKET_IFNAME", "lo,absent0", "GLOO_SOCKET_IFNAME = 'lo,absent0' names no network interface of host"),
    ],
)
def test_settings_are_named(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    started = time.monotonic()
    assert message in refusal()
    assert time.monotonic() - started < 10


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen(1)
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        assert f"MASTER_PORT = {port} is in use by another process on host {socket.gethostname()}" in refusal()
        with monkeypatch.context() as other:  # others than rank 0 find it open, and so does who is in torchrun's store
            other.setenv("RANK", "1")
            check_rendezvous("gloo")
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        check_rendezvous("gloo")


@pytest.mark.parametrize(
    ("value", "fits"),
    [("eth", True), ("=eth", False), ("=eth0", True), ("ib", False), ("ib,lo", True), ("^lo,docker", True),
     ("^=lo", True), ("^lo,eth", False)],
)  # fmt: skip
def test_interfaces_as_nccl_reads_them(value: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_interfaces", lambda: ["lo", "eth0"])
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
    check_rendezvous("gloo")  # which does not read it
    if fits:
        check_rendezvous("nccl")
    else:
        assert f"NCCL_SOCKET_IFNAME = {value!r}" in refusal("nccl")


@pytest.mark.parametrize(
    ("address", "problem"),
    [("127.0.1.1", "takes its own name for 127.0.1.1"), (None, "does not know its own name"), ("10.1.2.3", None)],
)
def test_a_node_that_others_cannot_reach(
    address: str | None, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def resolve(host: str, *rest: object) -> object:
        if host != socket.gethostname():
            return real(host, None)
        if address is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", resolve)
    check_rendezvous("gloo")  # nobody said that there are several nodes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    check_rendezvous("nccl")
    if problem is None:
        check_rendezvous("gloo")
    else:
        assert problem in refusal() and "set GLOO_SOCKET_IFNAME" in refusal()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    check_rendezvous("gloo")


def test_one_process_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_ADDR")
    check_rendezvous("gloo")


def test_a_late_rank_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    with said_when_late(30.0):
        pass
    with said_when_late(0.05):
        time.sleep(1.0)
    (said,) = caplog.messages
    assert said.startswith("rank 0 of 2 on host ")
    assert said.endswith(" has waited 0.05 s for the others at 127.0.0.1:29500 so far")


@pytest.mark.processes
def test_a_rank_whose_rank_0_never_comes_ends_in_one_line() -> None:
    code = (
        "import datetime, sys\n"
        "from megatron_tspin import parallel\n"
        "from megatron_tspin.config import ParallelSection\n"
        "from megatron_tspin.errors import StageError\n"
        "parallel.STEP_TIMEOUT = datetime.timedelta(seconds=1)\n"
        "try:\n"
        "    with parallel.distributed(ParallelSection(data_parallel_size=2)):\n"
        "        pass\n"
        "except StageError as error:\n"
        "    sys.exit(f'said: {error}')\n"
    )
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and nobody listens there
        port = str(unused.getsockname()[1])
        env = {**os.environ, "RANK": "1", "MASTER_PORT": port, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
        )
    assert (
        f"said: rank 1 of 2 on host {socket.gethostname()} did not meet the others at 127.0.0.1:{port} (" in done.stderr
    )
