"""What a job does with the end of its driver, without Slurm; `tests/slurm` sees the same with it."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tspin.config import Config
from megatron_tspin.errors import InputError
from megatron_tspin.selfplay import batch_script, submission
from megatron_tspin.selfplay.submission import submit
from tests.selfplay.test_kill import wait_for

ConfigOf = Callable[..., Config]
CPU = {"launch__gpus_per_node": 0, "launch__ranks_per_node": 1}


@pytest.fixture
def job(
    world: Path, config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], "subprocess.Popen[bytes]"]:
    """Starts the script of a job whose driver is a line of shell; `scontrol` notes how it was called."""
    (world / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {world}/scontrol.txt\n')
    (world / "scontrol").chmod(0o755)
    monkeypatch.setattr(batch_script, "_FATE_SECONDS", 0)
    text = batch_script.batch_script(config_of(launch__max_restarts=2, **CPU))

    def start(driver: str) -> "subprocess.Popen[bytes]":
        (world / "driver.sh").write_text(f"echo started >> {world}/started.txt\n{driver}\n")
        script = re.sub(
            r"^    \S+ -m megatron_tspin run .* &$", f"    bash {world}/driver.sh &", text, flags=re.MULTILINE
        )
        assert script != text
        (world / "submit.sh").write_text(script)
        env = {**os.environ, "PATH": f"{world}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
        return subprocess.Popen(["bash", str(world / "submit.sh")], env=env)

    return start


def starts(world: Path) -> int:
    path = world / "started.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.processes
@pytest.mark.parametrize(("code", "times"), [(0, 1), (1, 1), (2, 1), (3, 3), (4, 1), (5, 1), (75, 1)])
def test_only_a_failed_stage_is_tried_again(
    code: int, times: int, job: Callable[[str], "subprocess.Popen[bytes]"], world: Path
) -> None:
    assert job(f"exit {code}").wait(30) == code
    assert starts(world) == times
    assert not (world / "scontrol.txt").exists()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("number", "code", "queued"),
    [(signal.SIGUSR1, 75, True), (signal.SIGUSR1, 3, False), (signal.SIGUSR1, 2, False), (signal.SIGTERM, 75, False)],
)
def test_only_the_time_limit_queues_a_job_again(
    number: signal.Signals, code: int, queued: bool, job: Callable[[str], "subprocess.Popen[bytes]"], world: Path
) -> None:
    name = number.name.removeprefix("SIG")
    started = job(f"trap 'exit {code}' {name}; while true; do sleep 0.05; done")
    wait_for(lambda: starts(world) == 1)
    time.sleep(0.3)  # until it has set its trap
    started.send_signal(number)
    assert started.wait(30) == code
    assert starts(world) == 1
    requests = (world / "scontrol.txt").read_text() if queued else ""
    assert (world / "scontrol.txt").exists() == queued and requests == "requeue 17\n" * queued


@pytest.mark.processes
def test_a_time_limit_before_the_driver_listens(job: Callable[[str], "subprocess.Popen[bytes]"], world: Path) -> None:
    started = job("sleep 60 & wait")
    wait_for(lambda: starts(world) == 1)
    started.send_signal(signal.SIGUSR1)
    assert started.wait(30) == 128 + signal.SIGUSR1
    assert (world / "scontrol.txt").read_text() == "requeue 17\n"


def test_what_the_job_asks_for(config_of: ConfigOf) -> None:
    config = config_of(
        parallel__data_parallel_size=12, launch__time="24:00:00", launch__partition="gpu", launch__account="us",
        launch__qos="low", launch__cpus_per_rank=6, launch__modules=["cuda/13"],
        launch__exports={"NCCL_DEBUG": "W ARN"},
        launch__setup=[". venv/bin/activate"], launch__sbatch=["--exclusive"], launch__stop_before_end=120,
    )  # fmt: skip
    lines = batch_script.batch_script(config).splitlines()
    wanted = (
        "nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=6", "time=24:00:00", "partition=gpu",
        "account=us", "qos=low", "exclusive", "requeue", "signal=B:USR1@120", "open-mode=append",
    )  # fmt: skip
    assert {f"#SBATCH --{option}" for option in wanted} <= set(lines)
    assert {"module load cuda/13", "export NCCL_DEBUG='W ARN'", ". venv/bin/activate"} <= set(lines)


def test_a_dry_run_writes_and_submits_nothing(
    config_of: ConfigOf, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "check_before", lambda config: None)
    config = config_of(launch__time=60)
    assert submit(config, dry_run=True) is None
    assert "#SBATCH --time=60" in (world / "run" / "submit.sh").read_text()
    assert (world / "run" / "run.yaml").is_file()
    monkeypatch.setenv("PATH", str(world))
    with pytest.raises(InputError, match=r"sbatch is not on this host; submit .*submit.sh from a login node"):
        submit(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"launch__nodes": 1, "parallel__data_parallel_size": 12},
            "launch.nodes = 1: stage convert needs 2, with 8 ranks",
        ),
        ({"launch__gpus_per_node": 0}, "launch.gpus_per_node = 0: set launch.ranks_per_node"),
    ],
)
def test_a_job_that_cannot_hold_its_stages_is_refused(
    settings: dict[str, int], message: str, config_of: ConfigOf
) -> None:
    with pytest.raises(InputError, match=message):
        submit(config_of(**settings), dry_run=True)
