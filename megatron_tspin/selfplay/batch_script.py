"""The script of a Slurm job that brings a run to its end, however many jobs that takes."""

import shlex
import signal
import sys
from pathlib import Path

from megatron_tspin.config import Config
from megatron_tspin.config_launch import LaunchSection
from megatron_tspin.errors import EXIT_STAGE, EXIT_STOPPED
from megatron_tspin.run_folder import RunFolder
from megatron_tspin.selfplay.plan import plan

_AT_ONCE = 128 + signal.SIGUSR1
"""The exit code of a driver that had not yet come so far that it could stop in order."""
_FATE_SECONDS = 120
"""How long a job that was not asked to stop by its time limit waits for what Slurm does with it: after a preemption
Slurm queues it again itself, after scancel it ends it."""


def batch_script(config: Config) -> str:
    """The text of the script, for sbatch.

    Args:
        config: The run, with absolute paths.
    """
    launch, folder = config.launch, RunFolder(Path(config.run_dir))
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(config)), "", "set -u"]
    lines += [f"module load {shlex.quote(name)}" for name in launch.modules]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in launch.exports.items()]
    lines += launch.setup
    driver = [sys.executable, "-m", "megatron_tspin", "run", "--config", str(folder.config)]
    lines += ["", _DRIVE.format(driver=shlex.join([*driver, "--set", "launch.launcher=slurm"]), **_numbers(launch))]
    return "\n".join(lines)


def num_nodes(config: Config) -> int:
    """Nodes of the job."""
    launch = config.launch
    return launch.nodes or max(launch.nodes_for(stage.world_size) for stage in plan(config))


def _options(config: Config) -> list[str]:
    launch, folder = config.launch, RunFolder(Path(config.run_dir))
    options = {
        "job-name": f"tspin-{Path(config.run_dir).name}",
        "nodes": num_nodes(config),
        "ntasks-per-node": launch.most_ranks_on_a_node,
        "cpus-per-task": launch.cpus_per_rank,
        "gpus-per-node": launch.gpus_per_node or None,
        "time": launch.time,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "chdir": config.run_dir,
        "output": folder.job_log("%j"),
        "open-mode": "append",  # the same file after each requeue
        "signal": f"B:USR1@{launch.stop_before_end}",  # to the script alone, which tells the driver
    }
    return ["--requeue", *(f"--{name}={value}" for name, value in options.items() if value is not None), *launch.sbatch]


def _numbers(launch: LaunchSection) -> dict[str, int]:
    return {
        "restarts": launch.max_restarts,
        "failed": EXIT_STAGE,
        "stopped": EXIT_STOPPED,
        "at_once": _AT_ONCE,
        "fate": _FATE_SECONDS,
    }


# The traps only note and hand on: bash runs them between two commands, and `wait` returns early when one has run.
_DRIVE = """\
asked=
driver=
restarts=0
trap 'asked=USR1; kill -USR1 "$driver" 2>/dev/null' USR1
trap 'asked=TERM; kill -TERM "$driver" 2>/dev/null' TERM

while true; do
    {driver} &
    driver=$!
    code=256
    while kill -0 "$driver" 2>/dev/null || [ "$code" = 256 ]; do
        wait "$driver"
        code=$?
    done
    if [ "$code" != {failed} ] || [ -n "$asked" ] || [ "$restarts" -ge {restarts} ]; then
        break
    fi
    restarts=$((restarts + 1))
    echo "tspin: a stage failed; starting the run again ($restarts of {restarts})" >&2
done

if [ "$asked" = USR1 ] && {{ [ "$code" = {stopped} ] || [ "$code" = {at_once} ]; }}; then
    echo "tspin: the time limit is near; queueing the job again" >&2
    scontrol requeue "$SLURM_JOB_ID" && sleep {fate}
elif [ "$code" = {stopped} ]; then
    sleep {fate} &
    wait $!
fi
exit "$code"
"""
