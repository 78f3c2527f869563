"""Children answer, fail in one line, and never outlive their parent."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megatron_tspin.benchmark.worker import Child, ChildError

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
        word, pid = child.ask()
        assert word == "hello"
        assert child.ask("again") == "again"
        assert alive(pid)
    assert gone_soon(pid)


@pytest.mark.parametrize(
    ("word", "message"), [("fail", r"^ValueError: not like this$"), ("die", r"died \(SIGKILL, which .* memory")]
)
def test_failures_are_said_in_one_line(word: str, message: str) -> None:
    with Child(echo, "hello") as child:
        child.ask()
        with pytest.raises(ChildError, match=message):
            child.ask(word)


PARENT = """
import time
from tests.benchmark.test_bench_worker import busy
from megatron_tspin.benchmark.worker import Child
if __name__ == "__main__":
    print(Child(busy).ask(), flush=True)
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
