"""A run that is asked to stop, or in which a rank stands still, says so and goes on to the same bytes."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_tspin.errors import EXIT_STAGE, EXIT_STOPPED
from tests.end_to_end.runs import LAYOUTS, Runs
from tests.end_to_end.small_run import sha256_of, tree_of, write_config
from tests.end_to_end.test_kill import Processes, losses, wait_for

pytestmark = pytest.mark.processes

HANG_SECONDS = 8.0  # a step takes a tenth of a second


class Stopped:
    """A run with two ranks in training and in generation, which waits for the test at certain beats."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.run_dir, self._log, self._paused = folder / "run", folder / "run.log", folder / "paused"
        self.processes = Processes()
        self._data, self._config = data, folder / "run.yaml"

    def start(self, beat: str, hang_seconds: float = 300.0) -> None:
        """Starts the driver; returns when both ranks are in a beat, and stand still there."""
        write_config(
            self._config, tree_of(self._data, self.run_dir, launch__hang_seconds=hang_seconds, **LAYOUTS["dp2"])
        )
        self._log.unlink(missing_ok=True)
        self.driver = self.processes.start(
            self._config, self._log, TSPIN_TEST_PAUSE_AT_BEAT=beat, TSPIN_TEST_PAUSED=str(self._paused)
        )
        wait_for(lambda: len(self.announced()) == 2 or self.driver.poll() is not None, self.said)
        assert self.driver.poll() is None, self.said()

    def announced(self) -> list[Path]:
        return [path for path in self._paused.parent.glob("paused.*") if path.suffix != ".partial"]

    def release(self) -> None:
        for path in self.announced():
            path.unlink()

    def said(self) -> str:
        return self._log.read_text()

    def rank(self, stage: str, number: int) -> int:
        """Process id."""
        beat = json.loads((self.run_dir / "logs" / f"{stage}.ranks" / f"rank_{number:05d}.json").read_text())
        return int(beat["pid"])

    def end(self) -> int:
        """The driver's exit code; nothing of it is left."""
        code = self.driver.wait(120)
        wait_for(lambda: not self.processes.alive(), lambda: f"left: {self.processes.alive()}", seconds=60.0)
        return code


@pytest.fixture
def stopped(tmp_path: Path, runs: Runs) -> Iterator[Stopped]:
    assert runs["dp2"].is_dir()
    found = Stopped(tmp_path, runs.folder)
    yield found
    found.processes.kill_all()


def torchrun(processes: Processes) -> int:
    """Process id of the stage's launcher."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes.alive()}
    (found,) = (pid for pid, command in commands.items() if b"torch.distributed.run" in command)
    return found


def test_what_is_stopped_goes_on_to_the_same_bytes(stopped: Stopped, runs: Runs) -> None:
    run_dir, whole = stopped.run_dir, runs["dp2"]

    stopped.start("synthetic/0, 1 of")
    os.kill(stopped.driver.pid, signal.SIGTERM)
    wait_for(lambda: "asked the ranks to stop" in stopped.said(), stopped.said, 60)
    stopped.release()
    assert stopped.end() == EXIT_STOPPED, stopped.said()
    assert "stage rollout_000: stopped as SIGTERM asked: the whole shards of synthetic/0 are kept" in stopped.said()
    shards = {path.name: path.stat().st_mtime_ns for path in (run_dir / "iteration_000" / "synthetic").glob("*.jsonl")}
    assert len(shards) == 1

    stopped.start("train iteration 0, step 3")
    for name, written in shards.items():
        assert (run_dir / "iteration_000" / "synthetic" / name).stat().st_mtime_ns == written
    os.kill(torchrun(stopped.processes), signal.SIGUSR1)
    time.sleep(1.0)  # torchrun looks every tenth of a second, and waits half a minute for its ranks
    stopped.release()
    assert stopped.end() == EXIT_STOPPED, stopped.said()
    assert "iteration 0 is saved after step 3 of 8; the same command continues" in stopped.said()
    assert not list(run_dir.rglob("*.partial"))

    stopped.start("train iteration 0, step 6", HANG_SECONDS)
    os.kill(stopped.rank("train_000", 1), signal.SIGSTOP)
    started = time.monotonic()
    stopped.release()
    assert stopped.end() == EXIT_STAGE, stopped.said()
    assert time.monotonic() - started < HANG_SECONDS + 60
    _, hung, waiting, limit, _ = stopped.said().splitlines()[-5:]
    assert re.search(
        r"rank 1 has been standing still for \d+ s in `train iteration 0, step 6 of 8`: .* is stopped", hung
    )
    assert re.search(
        r"rank 0 waits in \w+, called by forward_backward \(megatron_tspin/training/loop.py:\d+\)", waiting
    )
    assert f"launch.hang_seconds is {HANG_SECONDS:g} s" in limit
    log = (run_dir / "logs" / "train_000.log").read_text()
    assert "driver: rank 1 has been standing still" in log.split("rank 0 INFO")[-1]

    stopped.start("held-out/1")  # training is done
    os.kill(stopped.driver.pid, signal.SIGUSR1)
    wait_for(lambda: "asked the ranks to stop" in stopped.said(), stopped.said, 60)
    stopped.release()
    assert stopped.end() == EXIT_STOPPED, stopped.said()
    for patterns in (("shard_*.jsonl",), ("*.bin", "*.idx"), ("*.distcp",)):
        made, expected = (sha256_of(folder / "iteration_000", *patterns) for folder in (run_dir, whole))
        assert made == expected and made
    assert losses(run_dir, 0) == losses(whole, 0)
