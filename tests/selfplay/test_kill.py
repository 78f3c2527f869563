"""The driver, its stage or both are killed; nothing survives, nobody else gets in meanwhile, and the run continues."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_tspin.errors import EXIT_STAGE, EXIT_STOPPED, InputError
from megatron_tspin.selfplay import launch
from megatron_tspin.selfplay.launchers import LocalLauncher
from megatron_tspin.selfplay.lock import run_lock
from tests.selfplay.fake_world import FakeRun, environment, run_command

pytestmark = pytest.mark.processes

REPOSITORY = Path(__file__).resolve().parents[2]


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def stage_pid(fake: FakeRun, stage: str) -> int | None:
    path = fake.world / "started.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    pids = [int(line.split()[1]) for line in lines if line.startswith(stage + " ")]
    return pids[-1] if pids else None


@pytest.fixture
def drive(fake: FakeRun) -> Iterator[Callable[[], "subprocess.Popen[str]"]]:
    """Starts drivers; what a test leaves behind is ended."""
    drivers: list[subprocess.Popen[str]] = []

    def start() -> "subprocess.Popen[str]":
        path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
        command = [sys.executable, str(Path(__file__).with_name("drive.py")), str(fake.world)]
        env = {**os.environ, "PYTHONPATH": path}
        drivers.append(
            subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts)
        )
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()
        driver.communicate()


def _heed_interrupts() -> None:
    """A shell that runs the tests in the background makes them, and so the driver, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def hang_in(fake: FakeRun, stage: str, drive: Callable[[], "subprocess.Popen[str]"]) -> "subprocess.Popen[str]":
    fake.behave(**{stage: "hang"})
    driver = drive()
    wait_for(lambda: stage_pid(fake, stage) is not None)
    return driver


def check_it_continues(fake: FakeRun, stage: str) -> None:
    fake.take_started()
    fake.behave()
    assert fake.go() == 0
    assert fake.take_started()[0] == stage
    assert (fake.run_dir / "report.html").is_file()


@pytest.mark.parametrize("stage", ["convert", "train_001"])
def test_sigkill_of_the_driver(fake: FakeRun, drive: Callable[[], "subprocess.Popen[str]"], stage: str) -> None:
    driver = hang_in(fake, stage, drive)
    pid = stage_pid(fake, stage)
    assert pid is not None
    driver.kill()
    driver.wait()
    wait_for(lambda: not is_alive(pid))
    check_it_continues(fake, stage)


def test_sigkill_of_the_stage(fake: FakeRun, drive: Callable[[], "subprocess.Popen[str]"]) -> None:
    driver = hang_in(fake, "rollout_001", drive)
    pid = stage_pid(fake, "rollout_001")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    _, errors = driver.communicate(timeout=20)
    assert driver.returncode == EXIT_STAGE
    assert "rollout_001" in errors and "SIGKILL" in errors
    check_it_continues(fake, "rollout_001")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, EXIT_STOPPED),
        (signal.SIGUSR1, EXIT_STOPPED),
        (signal.SIGHUP, EXIT_STOPPED),
        (signal.SIGINT, None),
    ],
)
def test_signals_end_driver_and_stage(
    fake: FakeRun, drive: Callable[[], "subprocess.Popen[str]"], number: signal.Signals, code: int | None
) -> None:
    driver = hang_in(fake, "train_000", drive)
    pid = stage_pid(fake, "train_000")
    assert pid is not None
    driver.send_signal(number)
    driver.communicate(timeout=20)
    assert driver.returncode != 0
    assert code is None or driver.returncode == code
    assert not is_alive(pid)
    check_it_continues(fake, "train_000")


def test_a_second_driver_is_refused_by_name(fake: FakeRun, drive: Callable[[], "subprocess.Popen[str]"]) -> None:
    driver = hang_in(fake, "convert", drive)
    with pytest.raises(InputError) as caught:
        fake.go()
    assert f"process {driver.pid} " in str(caught.value) and socket.gethostname() in str(caught.value)
    assert is_alive(driver.pid)


def test_a_stage_that_outlives_its_driver_keeps_the_run(tmp_path: Path) -> None:
    with run_lock(tmp_path) as lock:
        code = f"import fcntl, time; fcntl.flock({lock.descriptor}, fcntl.LOCK_EX); print(flush=True); time.sleep(600)"
        orphan = subprocess.Popen([sys.executable, "-c", code], pass_fds=(lock.descriptor,), stdout=subprocess.PIPE)
        assert orphan.stdout is not None
        orphan.stdout.readline()
        owner = json.loads((tmp_path / ".lock").read_text())
    try:
        dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
        (tmp_path / ".lock").write_text(json.dumps({**owner, "pid": int(dead.stdout)}))
        with pytest.raises(InputError, match="still runs"), run_lock(tmp_path, grace_seconds=0.3):
            pass
    finally:
        orphan.kill()
        orphan.communicate()
    with run_lock(tmp_path, grace_seconds=5.0):
        pass


def test_a_stale_lock_file_does_not_matter(tmp_path: Path) -> None:
    for content in ("", "{", '{"pid": 1, "host": "elsewhere"}', "[1]"):
        (tmp_path / ".lock").write_text(content)
        with run_lock(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_an_unnamed_owner_is_still_refused(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="process unknown"), run_lock(tmp_path):
            pass


def test_a_stage_that_ignores_sigterm_is_killed() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    child.stdout.readline()
    launch.stop(child, LocalLauncher(), patience_seconds=0.2)
    assert child.returncode == -signal.SIGKILL
    child.stdout.close()


def test_exit_code_of_a_signal(tmp_path: Path) -> None:
    with run_lock(tmp_path) as lock:
        code = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
        assert run_command([sys.executable, "-c", code], environment(tmp_path), lock) == 128 + signal.SIGSEGV
