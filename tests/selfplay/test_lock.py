"""Who holds a run, and that nobody commits who does not hold it any more."""

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config_launch import LaunchSection
from megatron_tspin.errors import InputError
from megatron_tspin.selfplay import launch, lock
from megatron_tspin.selfplay.lock import run_lock
from tests.selfplay.fake_world import FakeRun, environment, run_command


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("how", ["removed", "replaced", "taken"])
def test_a_lock_that_was_taken_away_commits_nothing(how: str, tmp_path: Path) -> None:
    with run_lock(tmp_path) as held:
        held.check()
        if how != "taken":
            (tmp_path / ".lock").unlink()
        if how == "removed":
            with pytest.raises(InputError, match=r"\.lock: was removed under this driver, which ends"):
                held.check()
            return
        owner = {"pid": os.getpid(), "host": "elsewhere", "since": "now", "token": "another"}
        (tmp_path / ".lock").write_text(json.dumps(owner))
        with pytest.raises(InputError, match="in use by process .* on host elsewhere .* was taken from this driver"):
            held.check()


def test_two_drivers_after_the_lock_file_is_gone(tmp_path: Path) -> None:
    with run_lock(tmp_path) as first:
        (tmp_path / ".lock").unlink()
        with run_lock(tmp_path) as second:
            second.check()
            with pytest.raises(InputError, match="was taken from this driver"):
                first.check()


@pytest.mark.processes
def test_a_stage_is_ended_when_the_run_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_LOOK_SECONDS", 0.2)
    with run_lock(tmp_path) as held:
        threading.Timer(0.5, (tmp_path / ".lock").unlink).start()
        started = time.monotonic()
        with pytest.raises(InputError, match="was removed under this driver"):
            run_command(
                [sys.executable, "-c", "import time; time.sleep(600)"], environment(tmp_path), held, LaunchSection()
            )
        assert time.monotonic() - started < 60


@pytest.mark.processes
def test_a_file_system_that_is_away_for_a_moment_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launch, "_LOOK_SECONDS", 0.1)
    looks: list[int] = []

    def away(held: lock.RunLock) -> None:
        looks.append(1)
        if len(looks) == 1:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with run_lock(tmp_path) as held:
        monkeypatch.setattr(lock.RunLock, "check", away)
        code = "import time; time.sleep(2.0)"
        assert run_command([sys.executable, "-c", code], environment(tmp_path), held) == 0
        assert len(looks) > 1 and "Stale file handle; looking again" in caplog.text


@pytest.mark.processes
def test_no_marker_is_written_for_a_run_of_another(fake: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run_process = launch.run_process

    def taken(*arguments: Any) -> int:
        code = run_process(*arguments)
        (fake.run_dir / ".lock").unlink()
        return code

    monkeypatch.setattr(launch, "run_process", taken)
    with pytest.raises(InputError, match="was removed under this driver"):
        fake.go()
    assert not (fake.run_dir / "stages" / "tokenize.json").exists()


def test_without_flock_the_lease_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_flock(monkeypatch)
    with run_lock(tmp_path) as first:
        assert "has no file locks (Function not implemented)" in caplog.text
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on host {socket.gethostname()}"):
            with run_lock(tmp_path):
                pass
        first.check()
    with run_lock(tmp_path) as second:  # handed back
        second.check()


@pytest.mark.parametrize(
    ("age", "host", "free"), [(0, "elsewhere", False), (400, "elsewhere", True), (400, "here", False)]
)
def test_without_flock_a_lease_of_another_host_ends_by_its_age(
    age: float, host: str, free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_flock(monkeypatch)
    name = socket.gethostname() if host == "here" else host
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"pid": os.getpid(), "host": name, "since": "then", "token": "x"}))
    os.utime(path, (time.time() - age, time.time() - age))
    if free:
        with run_lock(tmp_path) as held:
            held.check()
            held.renew()
            assert time.time() - path.stat().st_mtime < lock.LEASE_SECONDS / 2
    else:
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on host {name}"), run_lock(tmp_path):
            pass
