"""Tests that run on the login node of `two_nodes.sh`."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.small_run import environment

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They are no tests anywhere else."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("slurm")
            item.add_marker("processes")
            if "TSPIN_CLUSTER" not in os.environ:
                item.add_marker(pytest.mark.skip(reason="needs a Slurm of its own: make test-slurm"))


def wait_for(condition: Callable[[], object], what: Callable[[], str], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


class Cluster:
    """The cluster whose login node this is."""

    folder = Path(os.environ.get("TSPIN_CLUSTER", "."))

    def run(self, *words: object, check: bool = True) -> str:
        """What a command says on stdout."""
        command = list(map(str, words))
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=120)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def fact(self, job: str, name: str) -> str:
        """What Slurm knows of a job, e.g. its JobState."""
        found = dict(word.partition("=")[::2] for word in self.run("scontrol", "show", "job", job).split())
        return found[name]

    def wait_for_state(self, job: str, *states: str, seconds: float = 180.0) -> str:
        wait_for(
            lambda: self.fact(job, "JobState") in states,
            lambda: f"job {job} is not {states}: {self.run('scontrol', 'show', 'job', job)}",
            seconds,
        )
        return self.fact(job, "JobState")

    def kill_node(self, node: str) -> None:
        """As if its power was cut."""
        for pid in self.run("ip", "netns", "pids", node).split():
            subprocess.run(["kill", "-KILL", pid], check=False, stderr=subprocess.DEVNULL)

    def start_node(self, node: str) -> None:
        daemon = f"hostname {node}; exec slurmd -D -N {node}"
        with (self.folder / "log" / f"slurmd.{node}.again").open("ab") as log:
            subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{node}", "unshare", "--uts", "bash", "-c", daemon],
                stdout=log,
                stderr=log,
            )
        wait_for(
            lambda: self.run("sinfo", "-h", "-n", node, "-o", "%T", "-p", "low") == "idle", lambda: self.run("sinfo")
        )


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    return Cluster()
