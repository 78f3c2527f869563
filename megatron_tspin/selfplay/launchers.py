"""Who starts the ranks of a stage, hands signals on to them, and ends them: this host, or Slurm."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from megatron_tspin.config import Config
from megatron_tspin.config_launch import LaunchSection
from megatron_tspin.errors import InputError
from megatron_tspin.selfplay.plan import Stage
from megatron_tspin.selfplay.watchdog import ranks_here

_END_SECONDS = 60.0

Child = subprocess.Popen[bytes]
"""What a launcher started: a rank alone, torchrun, or srun."""


class Launcher(Protocol):
    """One way to start stages."""

    def command(self, stage: Stage) -> list[str]:
        """The command line that starts all ranks of a stage and waits for them."""

    def last_wish(self, stage: Stage) -> signal.Signals:
        """What the kernel sends to what was started when the driver dies, so that no rank is left."""

    def send(self, number: signal.Signals, child: Child, log_file: Path) -> bool:
        """Sends a signal to every rank that runs; False if there are none yet."""

    def kill(self, child: Child) -> None:
        """Ends all ranks at once, also those that heed nothing."""


def launcher_of(config: Config) -> Launcher:
    """The configured one.

    Raises:
        InputError: It is Slurm's, and this process is in no job of it.
    """
    if config.launch.launcher == "local":
        return LocalLauncher()
    if "SLURM_JOB_ID" not in os.environ:
        raise InputError(
            "launch.launcher = 'slurm': this is no Slurm job; use tspin submit or salloc, or set it to local"
        )
    return SlurmLauncher(config.launch)


class LocalLauncher:
    """On this host: Python alone for one rank, which saves torchrun's start, else torchrun."""

    def command(self, stage: Stage) -> list[str]:
        """See `Launcher`."""
        if stage.world_size == 1:
            return [sys.executable, *_program(stage)]
        # The port is torchrun's to find, which opens it: one that was free a moment ago may be taken by then.
        options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(stage.world_size)]
        return [sys.executable, "-m", "torch.distributed.run", *options, *_program(stage)]

    def last_wish(self, stage: Stage) -> signal.Signals:
        """Upon SIGTERM torchrun ends its ranks; a rank of its own gets SIGKILL."""
        return signal.SIGKILL if stage.world_size == 1 else signal.SIGTERM

    def send(self, number: signal.Signals, child: Child, log_file: Path) -> bool:
        """To each rank by itself: torchrun would give them 30 seconds."""
        ranks = ranks_here(log_file)
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return bool(ranks)

    def kill(self, child: Child) -> None:
        """The ranks go with torchrun (`launch.die_with_parent`)."""
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


class SlurmLauncher:
    """One srun step a stage inside this job, one task a rank: no torchrun, which would hide the ranks' exit codes."""

    def __init__(self, settings: LaunchSection) -> None:
        self._settings = settings

    def command(self, stage: Stage) -> list[str]:
        """See `Launcher`. A step takes the first nodes of the job, as many as its ranks need."""
        settings, size = self._settings, stage.world_size
        options = [
            f"--job-name={stage.name}",
            f"--nodes={settings.nodes_for(size)}",
            f"--ntasks={size}",
            f"--ntasks-per-node={min(size, settings.most_ranks_on_a_node)}",
            "--kill-on-bad-exit=1",
            "--unbuffered",
        ]
        if settings.gpus_per_node:
            options.append(f"--gpus-per-node={settings.gpus_per_node}")  # all of them for every rank: NCCL needs that
        if settings.cpus_per_rank:
            options.append(f"--cpus-per-task={settings.cpus_per_rank}")  # not inherited from the job since Slurm 22.05
        return ["srun", *options, *settings.srun, *self._in_container(), *_program(stage)]

    def _in_container(self) -> list[str]:
        """The beginning of a rank's command line, and options of srun before it."""
        settings = self._settings
        mounts = ",".join(settings.mounts)
        if settings.container == "pyxis":
            mounted = [f"--container-mounts={mounts}"] if mounts else []
            return [f"--container-image={settings.image}", *mounted, "python"]
        if settings.container == "apptainer":
            gpus = ["--nv"] if settings.gpus_per_node else []
            mounted = ["--bind", mounts] if mounts else []
            return ["apptainer", "exec", *gpus, *mounted, str(settings.image), "python"]
        return [sys.executable]

    def last_wish(self, stage: Stage) -> signal.Signals:
        """Tasks outlive an srun that gets SIGKILL; upon SIGTERM it ends them."""
        return signal.SIGTERM

    def send(self, number: signal.Signals, child: Child, log_file: Path) -> bool:
        """Srun hands SIGUSR1 and SIGUSR2 on to all tasks, and would end them upon SIGTERM."""
        with suppress(ProcessLookupError):
            child.send_signal(signal.SIGUSR1 if number == signal.SIGTERM else number)
        return True

    def kill(self, child: Child) -> None:
        """Srun ends its tasks upon SIGTERM; Slurm sends SIGKILL to those that do not (KillWait)."""
        with suppress(ProcessLookupError):
            child.terminate()
        try:
            child.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _program(stage: Stage) -> list[str]:
    return ["-m", "megatron_tspin", *stage.arguments]
