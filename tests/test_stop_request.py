"""A process that is asked to stop."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_tspin import stop_request
from megatron_tspin.stop_request import heeded, stop_requested

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_request, "_requested", None)


def test_the_request_is_remembered_and_handlers_go_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with heeded():
        assert stop_requested() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested() == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
    with heeded():  # as the next loop of the program does
        assert stop_requested() == "SIGTERM"


def test_signals_that_come_together_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, bool]] = []
    with heeded(on_request=lambda name, again: heard.append((name, again))):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [("SIGUSR1", False)]
        monkeypatch.setattr(stop_request, "_SAME_REQUEST_SECONDS", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [("SIGUSR1", False), ("SIGTERM", True)] and stop_requested() == "SIGUSR1"


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work() -> None:
        with heeded():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.processes
def test_a_later_signal_ends_the_process_at_once() -> None:
    code = (
        "import os, signal, time\n"
        "from megatron_tspin import stop_request\n"
        "stop_request._SAME_REQUEST_SECONDS = 0.0\n"
        "with stop_request.heeded():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=False)
    assert done.returncode == -signal.SIGUSR1
