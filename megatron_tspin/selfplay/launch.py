"""Starts the processes of a stage and makes sure that they never outlive the driver."""

import ctypes
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_tspin.config import Config
from megatron_tspin.config_launch import LaunchSection
from megatron_tspin.errors import EXIT_OK, HangError, InputError
from megatron_tspin.log import LOG_FILE_VARIABLE, get_logger
from megatron_tspin.selfplay.launchers import Child, Launcher
from megatron_tspin.selfplay.lock import RunLock
from megatron_tspin.selfplay.plan import Stage
from megatron_tspin.selfplay.watchdog import Watchdog, forget_beats
from megatron_tspin.stop_request import STOP_SIGNALS, stop_requested

_LAUNCHER_VARIABLES = frozenset({
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID",
    "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_GTIDS", "SLURM_STEP_ID", "SLURM_STEPID",
})  # fmt: skip
_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
_LAUNCHER_PREFIXES = (
    "TORCHELASTIC_", "PET_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_", "PMIX_", "PMI2_", "HYDRA_",
)  # fmt: skip
_LOOK_SECONDS = 5.0
_POLL_SECONDS = 0.5
_STOP_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1

logger = get_logger(__name__)


def shown(argv: list[str]) -> str:
    """A command line for people: short, and they can paste it into a shell in this folder."""
    words = [_from_here(word) for word in argv]
    if "megatron_tspin" in words:
        start = words.index("megatron_tspin")
        if words[0] == "srun":
            return shlex.join(words)
        several = "torch.distributed.run" in words
        words = ["torchrun", *words[3 : start + 1]] * several + ["tspin"] * (not several) + words[start + 1 :]
    return shlex.join(words)


def _from_here(word: str) -> str:
    """A path below the working folder without that folder; anything else as it is."""
    path = Path(word)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else word


def environment(config: Config, log_file: Path) -> dict[str, str]:
    """The environment of a stage's processes.

    Nothing is looked up on the network, and the package is found from any working directory.
    """
    return {
        **environment_without_launchers(),
        "OMP_NUM_THREADS": str(config.parallel.cpu_threads),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # What torchrun hands on to its ranks; without being told, all but the last.
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        LOG_FILE_VARIABLE: str(log_file),
    }


def environment_without_launchers() -> dict[str, str]:
    """This process's environment as a program of our own gets it.

    It knows of no launcher around us, whose ranks would be taken for its own. The package is found from any folder, and
    nothing in the working folder takes the place of a module of Python's (`random.py`, `tokenize.py`).
    """
    package_parent = str(Path(__file__).resolve().parents[2])
    search_path = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: value for name, value in os.environ.items() if not _is_of_a_launcher(name)}
    return {**kept, "PYTHONPATH": os.pathsep.join(search_path), "PYTHONSAFEPATH": "1"}


def forget_launchers() -> int:
    """For a driver: drops what a launcher around it has set, and says as which of its processes it was started.

    Everything of ours that asks for a rank would take the launcher's for its own, and be silent on all but the first.
    """
    numbers = [os.environ.get(name, "") for name in _RANK_VARIABLES]
    for name in [*filter(_is_of_a_launcher, os.environ), LOG_FILE_VARIABLE]:
        os.environ.pop(name, None)
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def refuse_other_drivers(launched_as: int) -> None:
    """A run has one driver, which starts the ranks itself.

    Raises:
        InputError: A launcher started several, and this is not the first.
    """
    if launched_as > 0:
        raise InputError(
            f"a launcher (torchrun, srun, mpirun) started this command as its process {launched_as}; start it once, "
            "without the launcher: it starts the ranks of its stages itself"
        )


def _is_of_a_launcher(name: str) -> bool:
    return name in _LAUNCHER_VARIABLES or name.startswith(_LAUNCHER_PREFIXES)


def run_process(stage: Stage, launcher: Launcher, env: dict[str, str], lock: RunLock, settings: LaunchSection) -> int:
    """Runs a stage to its end. Its stderr is the terminal's, so that progress bars work.

    Whatever ends the wait (Ctrl-C, a lock that was taken away, a rank that hangs) ends the stage first. When this
    process is asked to stop, the stage is. If this process dies without a chance to do that, the kernel ends the stage.

    Args:
        stage: What to run.
        launcher: Who starts its ranks.
        env: Environment, with the stage's log file.
        lock: The run's, which the stage inherits; looked at and renewed while it runs.
        settings: How long the stage may stand still, or take to stop.

    Returns:
        The exit code; 128 + the signal's number when a signal ended it.

    Raises:
        HangError: A rank stands still.
    """
    log_file = Path(env[LOG_FILE_VARIABLE])
    forget_beats(log_file)
    # A session of its own: Ctrl-C reaches the driver alone, which then ends the stage in order.
    child = subprocess.Popen(
        launcher.command(stage),
        env=env,
        pass_fds=(lock.descriptor,),
        start_new_session=True,
        preexec_fn=_die_with_parent(launcher.last_wish(stage)),
    )

    def send(number: signal.Signals) -> bool:
        return launcher.send(number, child, log_file)

    try:
        watchdog = Watchdog(log_file, settings, send)
        code = _wait(child, lock, watchdog, _StopOfStage(child, send, settings.stop_seconds))
    except HangError:
        launcher.kill(child)  # whoever hangs heeds nothing else
        raise
    except BaseException:
        stop(child, launcher)
        raise
    if code == EXIT_OK:
        forget_beats(log_file)
    return 128 - code if code < 0 else code


def _wait(child: Child, lock: RunLock, watchdog: Watchdog, stopping: "_StopOfStage") -> int:
    looked = time.monotonic()
    while True:
        try:
            return child.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            stopping.see_to_it()
            passed = time.monotonic() - looked
            if passed < _LOOK_SECONDS:
                continue
            looked += passed
            try:
                lock.check()
                lock.renew()
            except OSError as error:  # a network file system that is away for a moment is no reason to end a stage
                logger.warning("%s: %s; looking again", lock.path, error.strerror)
            watchdog.look(min(passed, 2 * _LOOK_SECONDS))


class _StopOfStage:
    """Hands a request to stop on to the ranks, and ends a stage that does not heed it in time."""

    def __init__(self, child: Child, send: Callable[[signal.Signals], bool], seconds: float) -> None:
        self._child, self._send, self._seconds = child, send, seconds
        self._deadline: float | None = None

    def see_to_it(self) -> None:
        """To be called all the time."""
        request = stop_requested()
        if request is None:
            return
        if self._deadline is None:
            self._deadline = time.monotonic() + self._seconds
            if self._send(_as_ranks_know_it(request)):
                logger.info("asked the ranks to stop")
            else:  # they have only just begun
                self._child.terminate()
        elif time.monotonic() > self._deadline:
            logger.warning("the stage did not stop within launch.stop_seconds = %g s and is ended", self._seconds)
            self._child.terminate()
            self._deadline = math.inf


def _as_ranks_know_it(request: str) -> signal.Signals:
    """The driver heeds more signals than they do."""
    return next((known for known in STOP_SIGNALS if known.name == request), signal.SIGTERM)


def stop(child: Child, launcher: Launcher, patience_seconds: float = _STOP_SECONDS) -> None:
    """Ends a stage: SIGTERM, so that torchrun or srun ends its ranks; more if that does not help, or Ctrl-C comes."""
    if child.poll() is not None:
        return
    os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(patience_seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        launcher.kill(child)


def _die_with_parent(wish: signal.Signals) -> Callable[[], None]:
    """What the child does before it becomes the stage: ask the kernel for a signal when the driver dies.

    torchrun and srun get SIGTERM, upon which they end their ranks; a rank of its own gets SIGKILL.
    """
    parent, libc = os.getpid(), ctypes.CDLL(None, use_errno=True)  # loaded before the fork

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(wish))
        if os.getppid() != parent:  # it died between the fork and the line above
            os._exit(128 + int(wish))

    return ask


def die_with_parent() -> None:
    """For a rank: be killed when torchrun is. Linux only; elsewhere torchrun's own care has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
