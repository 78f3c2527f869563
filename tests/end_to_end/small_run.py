"""A run small enough to be started many times, and the command lines that start it."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.rank_pool import THREADS
from tests.rounding import SMOOTH

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples" / "quickstart"
CHECKPOINT = EXAMPLE / "checkpoint"
TIMEOUT_SECONDS = 900.0  # of a whole run on a busy machine; a quiet one needs half a minute
NUM_TRAIN, NUM_HELD_OUT, BATCH, EPOCHS = 32, 16, 8, 2
NUM_STEPS = EPOCHS * NUM_TRAIN // BATCH


def write_data(folder: Path) -> None:
    """The first lines of the quickstart's data."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("annotated", NUM_TRAIN), ("held_out", NUM_HELD_OUT)):
        lines = (EXAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")


def tree_of(data: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """The config of a run; `changes` are settings whose dots are written as `__`."""
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "seed": 1,
        "model": {"hf_checkpoint": str(CHECKPOINT)},
        "data": {
            "annotated": str(data / "annotated.jsonl"),
            "held_out": str(data / "held_out.jsonl"),
            "seq_length": 48,
        },
        "objective": {"method": "tspin", "alpha": 0.3, "beta": 0.1},
        "optimizer": {name.removeprefix("optimizer."): value for name, value in SMOOTH.items()},
        "training": {
            "micro_batch_size": 4,
            "global_batch_size": BATCH,
            "epochs": EPOCHS,
            "save_interval": 1,
            "tensorboard": False,
        },
        "generation": {"max_new_tokens": 12, "batch_size": 8, "shard_size": 8},
        "self_play": {"iterations": 1},
        "parallel": {"cpu_threads": int(os.environ.get(THREADS, "1"))},
        "evaluation": {"scorer": f"{EXAMPLE / 'scorer.py'}:score"},
    }
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def environment(*search_path: Path, **more: str) -> dict[str, str]:
    """As a user's shell has it: nothing of torchrun, and the package found from any folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TSPIN_", "TORCHELASTIC_"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    path = os.pathsep.join([*map(str, search_path), str(REPOSITORY)])
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "megatron_tspin", *map(str, arguments)]


def tspin(*arguments: object, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Runs a command to its end and returns what it printed."""
    return subprocess.run(
        command(*arguments), env=env or environment(), capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )


def succeed(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Runs a command that must work."""
    done = tspin(*arguments)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


SAMPLED = ("token_log_probs", "mean_log_prob", "log_prob_sampled")
"""What the engine measured while it sampled. The answers do not depend on which others were in a step with them; these
do, as matrix products of another size round otherwise. Training computes its own."""


def sha256_of(folder: Path, *patterns: str) -> dict[str, str]:
    """Hex SHA-256 by path relative to the folder; of JSON files, of all but `SAMPLED`."""
    files = sorted({path for pattern in patterns for path in folder.rglob(pattern)})
    return {str(path.relative_to(folder)): content_sha256(path) for path in files}


def content_sha256(path: Path) -> str:
    """Hex SHA-256 of a file; of a JSON file with `SAMPLED`, of what is left without them."""
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and any(f'"{name}"'.encode() in content for name in SAMPLED):
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        records = [json.loads(line) for line in lines]
        content = json.dumps([{k: v for k, v in each.items() if k not in SAMPLED} for each in records]).encode()
    return hashlib.sha256(content).hexdigest()


def sampled_log_probs(folder: Path) -> list[float]:
    """Token log-probs of all answers in a folder's shards."""
    shards = sorted(folder.rglob("shard_*.jsonl"))
    lines = [line for shard in shards for line in shard.read_text(encoding="utf-8").splitlines()]
    return [value for line in lines for value in json.loads(line)["token_log_probs"]]
