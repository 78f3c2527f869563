"""The driver says which rank stands still, and where."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config_launch import LaunchSection
from megatron_tspin.errors import HangError
from megatron_tspin.heartbeat import Beat, read_beats
from megatron_tspin.run_folder import beats_folder
from megatron_tspin.selfplay import watchdog
from megatron_tspin.selfplay.launchers import LocalLauncher
from megatron_tspin.selfplay.lock import run_lock
from megatron_tspin.selfplay.watchdog import Watchdog, read_stack
from tests.selfplay.fake_world import environment, run_command

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("standing_still.py")
LIMITS = LaunchSection(hang_seconds=10, long_hang_seconds=100)
STEP = Beat(0, 1, "elsewhere", 5, "train iteration 0, step 2", "step")

NO_CHILD: Any = None

Start = Callable[..., "list[subprocess.Popen[bytes]]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts ranks that stand still in the named places."""
    stand_in = tmp_path / "lib" / "torch" / "distributed" / "stand_in.py"
    stand_in.parent.mkdir(parents=True)
    for package in (stand_in.parent, stand_in.parent.parent):
        (package / "__init__.py").write_text("")
    stand_in.write_text("import time\n\ndef all_reduce():\n    time.sleep(600)\n")
    path = os.pathsep.join([str(tmp_path / "lib"), str(REPOSITORY)])
    ranks: list[subprocess.Popen[bytes]] = []

    def begin(*places: str) -> "list[subprocess.Popen[bytes]]":
        env = {**environment(tmp_path), "PYTHONPATH": path}
        for number, place in enumerate(places):
            ranks.append(subprocess.Popen([sys.executable, str(PROGRAM), str(number), place], env=env))
        deadline = time.monotonic() + 60
        while [beat.kind for beat in read_beats(beats_folder(tmp_path / "stage.log"))] != ["step"] * len(places):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)  # from the beat to where they stand
        return ranks

    yield begin
    for rank in ranks:
        rank.kill()
        rank.wait()


def explained(log_file: Path) -> list[str]:
    """What is said once the ranks have stood still for too long."""
    dog = Watchdog(log_file, LIMITS, lambda number: LocalLauncher().send(number, NO_CHILD, log_file))
    for _ in range(3):
        dog.look(5.0)
    with pytest.raises(HangError) as caught:
        dog.look(5.0)
    return str(caught.value).splitlines()


@pytest.mark.processes
def test_a_stopped_rank_is_named(start: Start, tmp_path: Path) -> None:
    ranks = start("collective", "collective")
    ranks[1].send_signal(signal.SIGSTOP)
    while ") T " not in Path(f"/proc/{ranks[1].pid}/stat").read_text():
        time.sleep(0.01)
    hung, waiting, limit = explained(tmp_path / "stage.log")
    assert hung.startswith("rank 1 has been standing still for 15 s in `train iteration 0, step 1`: process ")
    assert f"process {ranks[1].pid} on " in hung and hung.endswith("is stopped (by SIGSTOP, or a shell's Ctrl-Z)")
    assert waiting.startswith("rank 0 waits in all_reduce")
    assert limit == "launch.hang_seconds is 10 s; raise it if that was to be expected"


@pytest.mark.processes
def test_the_rank_that_is_in_no_collective_is_named(start: Start, tmp_path: Path) -> None:
    start("collective", "own code", "collective")
    hung, waiting, _ = explained(tmp_path / "stage.log")
    assert hung.startswith("rank 1 ") and "is in stand" in hung
    assert waiting.startswith("ranks 0, 2 wait in all_reduce")


@pytest.mark.processes
def test_a_stage_with_a_rank_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tspin.selfplay.launch._LOOK_SECONDS", 0.2)
    env = {**environment(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    with run_lock(tmp_path) as lock, pytest.raises(HangError, match="rank 0 has been standing still"):
        command = [sys.executable, str(PROGRAM), "0", "own code"]
        run_command(command, env, lock, LaunchSection(hang_seconds=0.5))
    assert [beat.doing for beat in read_beats(beats_folder(tmp_path / "stage.log"))] == ["train iteration 0, step 1"]


class Ranks:
    """Beats without processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.beats: list[Beat] = []
        monkeypatch.setattr(watchdog, "_STACK_SECONDS", 0.0)  # nobody answers
        monkeypatch.setattr(watchdog, "read_beats", lambda folder: self.beats)

    def stand_still(self, dog: Watchdog, *beats: Beat, most: int = 100) -> int:
        """Looks of five seconds until the dog barks."""
        self.beats = list(beats)
        for count in range(most):
            try:
                dog.look(5.0)
            except HangError:
                return count
        return most


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


def test_limits_go_by_what_a_rank_does(ranks: Ranks, tmp_path: Path) -> None:
    def looks(*kinds: str) -> int:
        beats = [replace(STEP, rank=rank, kind=kind) for rank, kind in enumerate(kinds)]  # type: ignore[arg-type]
        return ranks.stand_still(Watchdog(tmp_path / "x.log", LIMITS, lambda number: False), *beats)

    assert looks("step") == 3
    assert looks("busy") == 21
    assert looks("busy", "waiting") == 21
    assert looks("waiting", "step") == 3
    assert looks("waiting", "waiting") == 21  # for nobody


def test_a_rank_that_beats_is_left_alone_whatever_others_do(ranks: Ranks, tmp_path: Path) -> None:
    dog = Watchdog(tmp_path / "x.log", LIMITS, lambda number: False)
    waiting = replace(STEP, rank=1, kind="waiting")
    for count in range(50):
        assert ranks.stand_still(dog, replace(STEP, count=count), waiting, most=2) == 2


def test_the_rank_behind_is_named_where_nobody_can_be_asked(ranks: Ranks, tmp_path: Path) -> None:
    ranks.beats = [replace(STEP, rank=rank, count=count) for rank, count in enumerate((9, 8, 9))]
    (hung, _) = explained(tmp_path / "x.log")
    assert hung.startswith("rank 1 ") and hung.endswith("process 1 on elsewhere does not say where it is")


def test_the_main_thread_is_read() -> None:
    text = (
        "Thread 0x0001 (most recent call first):\n"
        '  File "/lib/python3.11/threading.py", line 327 in wait\n\n'
        "Current thread 0x0002 (most recent call first):\n"
        '  File "/x/torch/distributed/distributed_c10d.py", line 10 in all_reduce\n'
        '  File "/x/megatron_tspin/parallel.py", line 20 in sum_over_replicas\n'
    )
    assert [(frame.name, frame.lineno) for frame in read_stack(text)] == [("sum_over_replicas", 20), ("all_reduce", 10)]
    assert read_stack("") == []
