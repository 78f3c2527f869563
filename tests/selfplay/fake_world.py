"""A small world for the driver: input files that preflight accepts, and stages that are tiny scripts."""

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from megatron_tspin.config import Config
from megatron_tspin.config_launch import LaunchSection
from megatron_tspin.log import LOG_FILE_VARIABLE
from megatron_tspin.models.families.registry import tensors
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.selfplay import driver, launch
from megatron_tspin.selfplay.launchers import LocalLauncher
from megatron_tspin.selfplay.lock import RunLock
from megatron_tspin.selfplay.plan import Stage

FAKE_STAGE = Path(__file__).with_name("fake_stage.py")

ARCHITECTURE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 6,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


def write_safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(end))


def shapes_of(checkpoint: Path) -> dict[str, list[int]]:
    """The tensors that a checkpoint's config.json describes."""
    architecture = read_architecture(checkpoint)
    return {
        name: list(shape)
        for tensor in tensors(architecture)
        for name, shape in zip(tensor.hf, tensor.layout.shapes, strict=True)
    }


PARAMETERS = 6 * 8 + 8 + 2 * (2 * 8 + (2 * 8 + 2 * 4) * 8 + 3 * 8 * 16)
"""Of the world's checkpoint: embedding, last norm, and two layers of norms, attention and MLP."""


def write_world(tmp_path: Path) -> Path:
    """Everything that a run reads."""
    checkpoint = tmp_path / "base"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(ARCHITECTURE))
    vocabulary = {text: number for number, text in enumerate(["<pad>", "<eos>", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.add_tokens(["<x>"])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    write_safetensors(checkpoint / "model.safetensors", shapes_of(checkpoint))
    lines = [json.dumps({"prompt": f"question {number}", "response": "answer"}) for number in range(3)]
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "scorer.py").write_text("def score(record, response):\n    return 1.0\n")
    return tmp_path


def tree_of(world: Path, **overrides: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "run_dir": str(world / "run"),
        "model": {"hf_checkpoint": str(world / "base")},
        "data": {"annotated": str(world / "train.jsonl"), "held_out": str(world / "held_out.jsonl"), "seq_length": 64},
        "generation": {"max_new_tokens": 8},
        "self_play": {"iterations": 2},
        "evaluation": {"scorer": f"{world / 'scorer.py'}:score"},
    }
    for name, value in overrides.items():
        *parents, leaf = name.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def environment(folder: Path) -> dict[str, str]:
    """Of a stage whose log is in a folder."""
    return {**os.environ, LOG_FILE_VARIABLE: str(folder / "stage.log")}


class FakeLauncher(LocalLauncher):
    """Starts commands of a test's own."""

    def __init__(self, command: Callable[[Stage], list[str]]) -> None:
        self._command = command

    def command(self, stage: Stage) -> list[str]:
        return self._command(stage)


def run_command(argv: list[str], env: dict[str, str], lock: RunLock, settings: LaunchSection | None = None) -> int:
    """A command as the driver runs a stage."""
    stage = Stage("stage", (), 1, (), ())
    return launch.run_process(stage, FakeLauncher(lambda _: argv), env, lock, settings or LaunchSection())


class FakeRun:
    """A run whose stages are tiny scripts."""

    def __init__(self, world: Path, config: Config, behave: bool = True) -> None:
        self.world, self.config, self.run_dir = world, config, Path(config.run_dir)
        self.launcher = FakeLauncher(self.command)
        self.tables = 0
        if behave:
            self.behave()

    def behave(self, **behaviour: str) -> None:
        """What the named stages do instead of their work."""
        (self.world / "behaviour.json").write_text(json.dumps(behaviour))

    def command(self, stage: Stage) -> list[str]:
        behaviour = str(self.world / "behaviour.json")
        return [sys.executable, "-S", str(FAKE_STAGE), stage.name, behaviour, *map(str, stage.outputs)]

    def count_table(self, run_dir: Path) -> None:
        assert run_dir == self.run_dir
        self.tables += 1

    def go(self, config: Config | None = None) -> int:
        return driver.run(
            config or self.config, on_iteration=self.count_table, launcher=self.launcher, check=lambda config: None
        )

    def take_started(self) -> list[str]:
        """Names of the stages that were started, in order, since the last look."""
        path = self.world / "started.txt"
        names = [line.split()[0] for line in path.read_text().splitlines()] if path.is_file() else []
        path.unlink(missing_ok=True)
        return names
