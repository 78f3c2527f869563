"""Runs as jobs of a real Slurm of two nodes: they go on after whatever happens to a job, to the same bytes."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.small_run import CHECKPOINT, sha256_of, succeed, tree_of, tspin, write_config, write_data
from tests.end_to_end.test_changed_execution import weights
from tests.end_to_end.test_kill import PAUSES, losses
from tests.rounding import all_within, same_updates
from tests.slurm.conftest import Cluster, wait_for

RANKS_PER_NODE = 2
TWO_NODES: dict[str, Any] = {
    "parallel__tensor_model_parallel_size": 2,
    "parallel__data_parallel_size": 2,
    "parallel__use_distributed_optimizer": True,
    "generation__data_parallel_size": 1,  # on the first node alone
    "launch__gpus_per_node": 0,
    "launch__ranks_per_node": RANKS_PER_NODE,
    "launch__partition": "low",
}
GENERATE, TRAIN = 2, 4
"""Ranks."""


class Submitted:
    """A run whose ranks wait for the test at certain beats."""

    def __init__(self, cluster: Cluster, folder: Path, **changes: Any) -> None:
        self.cluster, self.folder, self.run_dir = cluster, folder, folder / "run"
        write_data(folder)
        exports = {
            "PYTHONPATH": os.pathsep.join([str(PAUSES), os.environ.get("PYTHONPATH", "")]),
            "TSPIN_TEST_BEAT_FILE": str(folder / "beat"),
            "TSPIN_TEST_PAUSED": str(folder / "paused"),
            "OMP_NUM_THREADS": "1",
        }
        self.tree = tree_of(folder, self.run_dir, launch__exports=exports, **{**TWO_NODES, **changes})
        self.config = write_config(folder / "run.yaml", self.tree)
        self.job = ""

    def submit(self, *settings: str) -> None:
        assignments = [word for setting in settings for word in ("--set", setting)]
        self.job = succeed("submit", "--config", self.config, *assignments).stdout.strip()
        assert self.job.isdecimal()

    def said(self) -> str:
        path = self.run_dir / "logs" / f"slurm-{self.job}.out"
        return path.read_text() if path.exists() else ""

    def pause_at(self, beat: str) -> None:
        (self.folder / "beat").write_text(beat)

    def wait_until_paused(self, ranks: int) -> None:
        wait_for(lambda: len(self.announced()) == ranks, lambda: f"{self.said()}\n{self.cluster.run('squeue')}")

    def announced(self) -> list[Path]:
        return [path for path in self.folder.glob("paused.*") if path.suffix != ".partial"]

    def go_on_until(self, beat: str) -> None:
        """Lets those go that wait; processes that begin from now on wait at another beat."""
        self.pause_at(beat)
        self.release()

    def release(self) -> None:
        for path in self.announced():
            path.unlink()

    def wait_for_line(self, text: str, times: int = 1) -> None:
        wait_for(lambda: self.said().count(text) >= times, lambda: f"{text!r} is not in\n{self.said()}")

    def rank(self, stage: str, number: int) -> int:
        """Process id, which all nodes of this machine share."""
        beat = json.loads((self.run_dir / "logs" / f"{stage}.ranks" / f"rank_{number:05d}.json").read_text())
        assert beat["host"] == f"n{number // RANKS_PER_NODE + 1}"
        return int(beat["pid"])


@pytest.fixture
def submitted(cluster: Cluster, tmp_path: Path) -> Iterator[Submitted]:
    found = Submitted(cluster, tmp_path, launch__hang_seconds=30.0, launch__max_restarts=3, launch__stop_before_end=60)
    yield found
    found.release()
    cluster.run("scancel", found.job, check=False)


def test_a_run_goes_on_whatever_happens_to_its_job(submitted: Submitted, cluster: Cluster) -> None:
    run_dir = submitted.run_dir
    submitted.pause_at("synthetic/0, 1 of")
    submitted.submit()

    # The time limit comes near: the run is asked to stop, saves, and queues itself again.
    submitted.wait_until_paused(GENERATE)
    cluster.run("scontrol", "update", f"JobId={submitted.job}", "TimeLimit=1")
    submitted.wait_for_line("asked the ranks to stop")
    submitted.go_on_until("train iteration 0, step 2")
    submitted.wait_for_line("the time limit is near; queueing the job again")
    cluster.wait_for_state(submitted.job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={submitted.job}", "TimeLimit=60")
    assert cluster.fact(submitted.job, "Restarts") == "1"
    assert "the whole shards of synthetic/0 are kept" in submitted.said()

    # Another job takes the nodes: Slurm ends the run in the grace time, and queues it again.
    submitted.wait_until_paused(TRAIN)
    other = cluster.run(
        "sbatch", "--parsable", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"
    )
    wait_for(lambda: "PreemptTime=20" in cluster.run("scontrol", "show", "job", submitted.job), submitted.said)
    time.sleep(1.0)  # and within ten seconds of grace the ranks are ended
    submitted.go_on_until("train iteration 0, step 4")
    submitted.wait_for_line("iteration 0 is saved after step 2 of 8")
    cluster.wait_for_state(other, "COMPLETED")
    assert cluster.fact(submitted.job, "Restarts") == "2"

    # A rank is killed, another one hangs: the same job starts the run again.
    submitted.wait_until_paused(TRAIN)
    os.kill(submitted.rank("train_000", 3), signal.SIGKILL)
    submitted.go_on_until("train iteration 0, step 5")
    submitted.wait_for_line("starting the run again (1 of 3)")
    submitted.wait_until_paused(TRAIN)
    os.kill(submitted.rank("train_000", 3), signal.SIGSTOP)
    submitted.go_on_until("train iteration 0, step 6")
    submitted.wait_for_line("rank 3 has been standing still")
    submitted.wait_for_line("starting the run again (2 of 3)")

    # A node dies: Slurm queues the job again.
    submitted.wait_until_paused(TRAIN)
    cluster.kill_node("n2")
    submitted.go_on_until("held-out/1")
    cluster.wait_for_state(submitted.job, "PENDING")
    cluster.start_node("n2")

    # The job is cancelled, and stays so.
    submitted.wait_until_paused(GENERATE)
    cluster.run("scancel", submitted.job)
    submitted.release()
    cluster.wait_for_state(submitted.job, "CANCELLED")
    whole = on_one_host(submitted, iterations=1)
    for patterns in (("shard_*.jsonl",), ("*.bin", "*.idx"), ("*.distcp",)):
        made, expected = (sha256_of(folder / "iteration_000", *patterns) for folder in (run_dir, whole))
        assert made == expected and made
    assert losses(run_dir, 0) == losses(whole, 0)
    assert cluster.fact(submitted.job, "JobState") == "CANCELLED"
    assert not list(run_dir.rglob("*.partial"))

    # One node is left: the run goes on there with half the ranks, within rounding.
    submitted.pause_at("nowhere")
    submitted.submit("self_play.iterations=2", "parallel.data_parallel_size=1", "launch.nodes=1")
    cluster.wait_for_state(submitted.job, "COMPLETED", seconds=400)
    on_one_host(submitted, iterations=2)
    all_within("loss", *([line["loss"] for line in losses(folder, 1)] for folder in (run_dir, whole)))
    same_updates(*(weights(folder) for folder in (run_dir / "export/hf", whole / "export/hf", CHECKPOINT)))


def on_one_host(submitted: Submitted, iterations: int) -> Path:
    """The same run without Slurm, in the layout that it began with; its folder."""
    whole = submitted.folder / "whole"
    tree = {**submitted.tree, "run_dir": str(whole), "launch": {}, "self_play": {"iterations": iterations}}
    succeed("run", "--config", write_config(submitted.folder / "whole.yaml", tree))
    return whole


def test_bad_input_is_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    submitted = Submitted(cluster, tmp_path)
    cluster.run("scontrol", "update", "PartitionName=low", "State=DOWN")  # jobs wait
    try:
        submitted.submit()
        (tmp_path / "annotated.jsonl").write_text("{\n")
    finally:
        cluster.run("scontrol", "update", "PartitionName=low", "State=UP")
    cluster.wait_for_state(submitted.job, "FAILED")
    assert cluster.fact(submitted.job, "ExitCode") == "2:0" and cluster.fact(submitted.job, "Restarts") == "0"
    assert "annotated.jsonl:1: " in submitted.said() and "starting the run again" not in submitted.said()


def test_nodes_that_differ_are_named_before_any_stage(cluster: Cluster, tmp_path: Path) -> None:
    prolog = tmp_path / "prolog.sh"
    prolog.write_text("#!/bin/bash\necho export NCCL_ALGO=of_$(hostname)\n")
    prolog.chmod(0o755)
    submitted = Submitted(cluster, tmp_path, launch__srun=[f"--task-prolog={prolog}"])
    submitted.submit()
    cluster.wait_for_state(submitted.job, "FAILED")
    assert cluster.fact(submitted.job, "ExitCode") == "2:0"
    assert "FAIL  n2: NCCL_ALGO = of_n2, on n1 of_n1; set the same on all nodes" in submitted.said()
    assert not (submitted.run_dir / "stages").exists()


def test_what_sbatch_refuses_is_said(cluster: Cluster, tmp_path: Path) -> None:
    submitted = Submitted(cluster, tmp_path, launch__partition="absent")
    done = tspin("submit", "--config", submitted.config)
    assert done.returncode == 2
    assert "tspin: error: sbatch refused" in done.stderr and "invalid partition" in done.stderr.lower()
