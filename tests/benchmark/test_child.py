"""Children answer, fail in one line, and never outlive their parent."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megatron_tspin.benchmark.child import Child, ChildError, threads_environment

pytestmark = pytest.mark.processes

REPOSITORY = Path(__file__).resolve().parents[2]


def echo(connection: Connection, first: str) -> None:
    connection.send((True, (first, os.getpid())))
    while True:
        (word,) = connection.recv()
        if word == "fail":
            raise ValueError("not like this\nsecond line")
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        connection.send((True, word))


def busy(connection: Connection) -> None:
    connection.send((True, os.getpid()))
    time.sleep(60)


def with_a_process_of_its_own(connection: Connection) -> None:
    """What it starts, a fork that shares the pipe, outlives it."""
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    connection.send((True, pid))
    os.kill(os.getpid(), signal.SIGKILL)


def tell(connection: Connection) -> None:
    sys.stdout.write("on the way\n")
    sys.stdout.flush()
    connection.send((True, (os.environ["OMP_NUM_THREADS"], "torch" in sys.modules)))
    os.abort()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def gone_soon(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_a_child_answers_and_ends() -> None:
    with Child(echo, "hello") as child:
        word, pid = child.receive()
        assert word == "hello"
        assert child.ask("again") == "again"
        assert alive(pid)
    assert gone_soon(pid)


@pytest.mark.parametrize(
    ("word", "message"), [("fail", r"^ValueError: not like this$"), ("die", r"died \(SIGKILL, which .* memory")]
)
def test_failures_are_said_in_one_line(word: str, message: str) -> None:
    with Child(echo, "hello") as child:
        child.receive()
        with pytest.raises(ChildError, match=message):
            child.ask(word)


def test_a_child_that_is_busy_is_waited_for_no_longer_than_asked() -> None:
    with pytest.raises(TimeoutError), Child(busy) as child:
        pid = child.receive(60.0)
        child.receive(0.1)
    assert gone_soon(pid)


def test_what_a_child_has_started_ends_too_and_does_not_hide_its_death() -> None:
    with pytest.raises(ChildError, match="SIGKILL"), Child(with_a_process_of_its_own) as child:
        pid, started = child.receive(), time.monotonic()
        child.receive(60.0)
    assert time.monotonic() - started < 20
    assert gone_soon(pid)


def test_a_log_takes_what_a_child_says_and_its_end_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Child(tell, environment=threads_environment(3), log=log) as child:
        assert child.receive() == ("3", False)
        with pytest.raises(ChildError, match=r"died \(SIGABRT\); the end of its log: on the way"):
            child.receive()
    assert log.read_text().startswith("on the way")


PARENT = """
import time
from tests.benchmark.test_child import busy
from megatron_tspin.benchmark.child import Child
if __name__ == "__main__":
    print(Child(busy).receive(), flush=True)
    time.sleep(60)
"""


def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
        parent.wait()
    assert gone_soon(pid)
