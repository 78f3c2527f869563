"""The user's scorer on one example, in a process of its own, before any stage starts.

A scorer may print, fork, hang, crash or end its process; none of that may reach the driver, which imports none of it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_tspin.config import Config
from megatron_tspin.errors import InputError
from megatron_tspin.selfplay.launch import environment_without_launchers

_LOADING_SECONDS = 120.0
_SHOWN_LINES = 3


def try_scorer(config: Config) -> None:
    """Loads the scorer and lets it judge the first held-out example's own annotated response.

    Raises:
        InputError: It cannot be loaded, failed, took too long, or returned something else than a number from 0 to 1.
    """
    scorer, held_out = config.evaluation.scorer, config.data.held_out
    if scorer is None or held_out is None:
        return
    seconds = config.evaluation.scorer_seconds
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "megatron_tspin.generation.scorer_trial", scorer, held_out, str(seconds)]
        try:
            done = subprocess.run(
                [*command, str(answer)],
                env=environment_without_launchers(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_LOADING_SECONDS + seconds,
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"evaluation.scorer = {scorer!r}: did not load and judge one example within {error.timeout:.0f} s"
            ) from error
        if not answer.is_file():
            said = done.stderr.decode(errors="replace").strip().splitlines()[-_SHOWN_LINES:]
            raise InputError(
                f"evaluation.scorer = {scorer!r}: ended its process (exit code {done.returncode}) when tried on one "
                f"example{': ' if said else ''}{' | '.join(said)}"
            )
        problem = json.loads(answer.read_text(encoding="utf-8"))
    if problem is not None:
        raise InputError(problem)
