"""The user's scorer on one example, in a process of its own, before any stage starts.

A scorer may print, fork, hang, crash or end its process; none of that may reach the driver, which imports none of it.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_tspin.config import Config
from megatron_tspin.data.splits import splits_of
from megatron_tspin.errors import InputError
from megatron_tspin.run_folder import HELD_OUT
from megatron_tspin.selfplay.launch import environment_without_launchers

_LOADING_SECONDS = 120.0
_SHOWN_LINES = 3
_STUCK = re.compile(r'^Timeout \(.*\)!\nThread .*\n  File "(?P<file>[^"]+)", line (?P<line>\d+) in ', re.MULTILINE)
"""How faulthandler begins; see `generation.scorer`."""


def try_scorer(config: Config) -> None:
    """Loads the scorer and lets it judge the first held-out example's own annotated response.

    Raises:
        InputError: It cannot be loaded, failed, took too long, or returned something else than a number from 0 to 1.
    """
    scorer, split = config.evaluation.scorer, splits_of(config.data).get(HELD_OUT)
    if scorer is None or split is None:
        return
    first = next(split(quiet=True)).item
    seconds = config.evaluation.scorer_seconds
    with tempfile.TemporaryDirectory() as folder:
        example, answer, said = (Path(folder) / name for name in ("example.json", "answer.json", "said.txt"))
        example.write_text(first.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", "megatron_tspin.generation.scorer_trial", scorer, str(example), str(seconds)]
        code = _run([*command, str(answer)], said, _LOADING_SECONDS + seconds)
        if code is None:
            raise InputError(
                f"evaluation.scorer = {scorer!r}: did not load and judge one example within "
                f"{_LOADING_SECONDS + seconds:.0f} s"
            )
        if not answer.is_file():
            output = said.read_text(encoding="utf-8", errors="replace").strip()
            raise InputError(f"evaluation.scorer = {scorer!r}: {_how_it_ended(output, code, seconds)}")
        problem = json.loads(answer.read_text(encoding="utf-8"))
    if problem is not None:
        raise InputError(problem)


def _how_it_ended(output: str, code: int, seconds: float) -> str:
    """What to say of a scorer whose process ended before it returned."""
    stuck = _STUCK.search(output)
    if stuck is not None:
        return (
            f"took more than {seconds:g} s for the first example, in a call that does not come back to Python "
            f"({stuck['file']}:{stuck['line']})"
        )
    last = output.splitlines()[-_SHOWN_LINES:]
    return f"ended its process (exit code {code}) when tried on one example{': ' if last else ''}{' | '.join(last)}"


def _run(command: list[str], said: Path, seconds: float) -> int | None:
    """Exit code of a command with all that it started; None if it took longer. Its output goes to a file."""
    with said.open("wb") as output:
        child = subprocess.Popen(
            command,
            env=environment_without_launchers(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # also whom it has left behind
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
