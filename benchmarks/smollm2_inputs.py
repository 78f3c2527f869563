"""SmolLM2-135M-Instruct and questions of `gsm_symbolic` with worked solutions, for scripts of this folder."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_tspin.cli.main import main

_EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "smollm2"


def run_bench(name: str, data_option: str, given: Sequence[str]) -> int:
    """Runs `tspin bench NAME`, without --model on inputs that are made for it; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        made = [] if {"--model", "--help", "-h"} & set(given) else _make_inputs(Path(folder), data_option)
        return main(["bench", name, *made, *given])


def _make_inputs(folder: Path, data_option: str) -> list[str]:
    """Writes the checkpoint and the questions; returns the options that name them."""
    commands = (
        ("make_checkpoint.py", "--out", str(folder / "smollm2")),
        ("make_data.py", "--out", str(folder / "data"), "--train", "64", "--held-out", "1", "--seed", "1"),
    )
    for script, *options in commands:
        subprocess.run([sys.executable, str(_EXAMPLE / script), *options], check=True)
    return ["--model", str(folder / "smollm2"), data_option, str(folder / "data" / "annotated.jsonl")]
