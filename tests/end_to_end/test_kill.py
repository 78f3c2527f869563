"""A run that is killed once inside every stage ends in the same bytes as one that is not."""

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.small_run import (
    NUM_STEPS,
    TIMEOUT_SECONDS,
    command,
    environment,
    sampled_log_probs,
    sha256_of,
    tree_of,
    write_config,
    write_data,
)

pytestmark = pytest.mark.processes

PAUSES = Path(__file__).with_name("pauses")
MARK = "TSPIN_TEST_RUN"  # environment variable that all processes of a test inherit, whatever session they are in
MEASURED = {"seconds", "tokens_per_second"}


@dataclass(frozen=True)
class Kill:
    """The run is killed before a file gets its name.

    Attributes:
        stage: The stage that the run is in.
        before: End of the path of the file or folder.
        there: What is there at this moment.
        lines: Number of lines in the iteration's metrics at this moment.
    """

    stage: str
    before: str
    there: tuple[str, ...]
    lines: int | None = None


KILLS = (
    Kill(
        "tokenize",
        "data/train_annotated_document.idx",
        ("data/held_out.jsonl", "data/held_out_prompt_document.json"),  # names come last written, first given
    ),
    Kill("convert", "initial/checkpoint", ("initial/checkpoint.partial/manifest.json",)),
    Kill(
        "rollout_000",
        "iteration_000/synthetic/shard_00002.jsonl",
        (
            "evaluation/policy_000.json",
            "proto/summary.json",
            "iteration_000/synthetic/shard_00001.jsonl",
            "iteration_000/synthetic/shard_00002.jsonl.partial",
        ),
    ),
    Kill(
        "train_000",
        "iteration_000/checkpoint/step_00000003",
        (
            "iteration_000/checkpoint/step_00000002/manifest.json",
            "iteration_000/checkpoint/step_00000003.partial/manifest.json",
        ),
        lines=3,
    ),
    Kill(
        "rollout_001",
        "evaluation/policy_001/sampled/shard_00001.jsonl",
        ("evaluation/policy_001/greedy/shard_00001.jsonl", "evaluation/policy_001/sampled/shard_00000.jsonl"),
    ),
    # The driver alone is left: the stage has ended, and nobody has said so yet.
    Kill("train_001", "stages/train_001.json", (f"iteration_001/checkpoint/step_{NUM_STEPS:08d}/manifest.json",), 8),
    Kill("export", "export/hf", ("export/hf.partial/model.safetensors",)),
    Kill("report", "report.html", ("export/hf/model.safetensors", "report.html.partial")),
)


class Processes:
    """Starts runs and knows every process that comes of them."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex

    def start(self, config: Path, log: Path, **pause: str) -> "subprocess.Popen[bytes]":
        env = environment(PAUSES, **{MARK: self.mark}, **pause)
        with log.open("ab") as stream:
            return subprocess.Popen(command("run", "--config", config), env=env, stdout=stream, stderr=stream)

    def alive(self) -> list[int]:
        """Process ids, in whatever session and under whatever parent they are."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                mine = folder.name.isdigit() and f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes()
            except OSError:
                continue
            if mine and int(folder.name) != os.getpid():
                found.append(int(folder.name))  # the environment of a zombie reads as empty
        return found

    def kill_all(self) -> None:
        for pid in self.alive():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.fixture
def processes() -> Iterator[Processes]:
    found = Processes()
    yield found
    found.kill_all()


def wait_for(condition: Callable[[], bool], what: Callable[[], str], seconds: float = TIMEOUT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


def kill_once(kill: Kill, config: Path, run_dir: Path, processes: Processes, paused: Path, log: Path) -> None:
    """Starts the run, kills driver and stage where `kill` says, and sees that nothing is left of them."""
    paused.unlink(missing_ok=True)
    driver = processes.start(
        config, log, TSPIN_TEST_PAUSE_AT=f"{run_dir.name}/{kill.before}", TSPIN_TEST_PAUSED=str(paused)
    )
    try:
        wait_for(lambda: paused.exists() or driver.poll() is not None, lambda: f"never came to {kill}")
        assert driver.poll() is None, f"ended before it came to {kill}:\n{log.read_text()}"
        assert not (run_dir / "stages" / f"{kill.stage}.json").exists()
        assert not (run_dir / kill.before).exists()
        assert [name for name in kill.there if not (run_dir / name).exists()] == []
        if kill.lines is not None:
            iteration = int(kill.stage[-3:])
            assert len(losses(run_dir, iteration)) == kill.lines
        os.kill(driver.pid, signal.SIGKILL)
        stage = int(paused.read_text())
        if stage != driver.pid:
            end_group_of(stage)
    finally:
        driver.kill()
        driver.wait()
    wait_for(lambda: not processes.alive(), lambda: f"still there after {kill}: {processes.alive()}", seconds=60.0)


def end_group_of(stage: int) -> None:
    """Kills a stage's group, unless the kernel did so already because the driver is gone."""
    try:
        os.killpg(os.getpgid(stage), signal.SIGKILL)
    except ProcessLookupError:
        return


def losses(run_dir: Path, iteration: int) -> list[dict[str, Any]]:
    """The iteration's metrics without what a clock measured."""
    path = run_dir / f"iteration_{iteration:03d}" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def test_killed_in_every_stage(tmp_path: Path, processes: Processes) -> None:
    write_data(tmp_path)
    runs = {name: tmp_path / name for name in ("unbroken", "killed")}
    configs = {
        name: write_config(tmp_path / f"{name}.yaml", tree_of(tmp_path, run_dir, self_play__iterations=2))
        for name, run_dir in runs.items()
    }
    logs = {name: tmp_path / f"{name}.log" for name in runs}
    others = Processes()  # the unbroken run goes on beside the killed one
    try:
        unbroken = others.start(configs["unbroken"], logs["unbroken"])
        for kill in KILLS:
            kill_once(kill, configs["killed"], runs["killed"], processes, tmp_path / "paused", logs["killed"])
        last = processes.start(configs["killed"], logs["killed"])
        assert last.wait(TIMEOUT_SECONDS) == 0, logs["killed"].read_text()
        assert unbroken.wait(TIMEOUT_SECONDS) == 0, logs["unbroken"].read_text()
    finally:
        others.kill_all()
    wait_for(lambda: not processes.alive() + others.alive(), lambda: "processes are left", seconds=60.0)
    check_same(runs["killed"], runs["unbroken"])


def check_same(killed: Path, unbroken: Path) -> None:
    for patterns, least in (
        (("model.safetensors",), 1),
        (("*.bin", "*.idx"), 14),  # prompts and annotated twice (train, held out), proto, two times synthetic
        (("shard_*.jsonl",), 4 + 8 + 12),
        (("policy_*.json", "train.jsonl", "held_out.jsonl", "summary.json"), 8),
    ):
        expected = sha256_of(unbroken, *patterns)
        assert len(expected) >= least, sorted(expected)
        assert sha256_of(killed, *patterns) == expected
    assert sampled_log_probs(killed) == pytest.approx(sampled_log_probs(unbroken), abs=1e-4)
    for iteration in range(2):
        found = losses(killed, iteration)
        assert [line["step"] for line in found] == list(range(1, NUM_STEPS + 1))
        assert found == losses(unbroken, iteration)
    assert not list(killed.rglob("*.partial"))
    assert sha256_of(killed / "stages", "*.json").keys() == sha256_of(unbroken / "stages", "*.json").keys()
