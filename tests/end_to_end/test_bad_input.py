"""Bad input through the real command line: exit code 2 and what is wrong where, before a model or torch is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.small_run import CHECKPOINT, environment, tree_of, tspin, write_config, write_data

pytestmark = pytest.mark.processes

NO_TORCH = """import os, pathlib
pathlib.Path(os.environ["TSPIN_TEST_TORCH"]).touch()
raise ImportError("bad input needs no torch")
"""

Spoil = Callable[[Path, dict[str, Any]], None]


class World:
    """Good input, to be spoilt."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        write_data(folder)
        shutil.copytree(CHECKPOINT, folder / "checkpoint")
        self.tree = tree_of(folder, self.run_dir, model__hf_checkpoint=str(folder / "checkpoint"))
        shadow = folder / "shadow" / "torch"
        shadow.mkdir(parents=True)
        (shadow / "__init__.py").write_text(NO_TORCH)
        self.env = environment(folder / "shadow", TSPIN_TEST_TORCH=str(folder / "torch_was_imported"))

    def run(self, *arguments: object) -> Any:
        done = tspin("run", "--config", self.config(), *arguments, env=self.env)
        assert not (self.folder / "torch_was_imported").exists(), done.stderr
        assert "Traceback" not in done.stderr
        return done

    def config(self) -> Path:
        return write_config(self.folder / "config.yaml", self.tree)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def with_line(number: int, text: str) -> Spoil:
    """Replaces a line of the annotated examples, counted from 1."""

    def spoil(folder: Path, tree: dict[str, Any]) -> None:
        lines = (folder / "annotated.jsonl").read_text().splitlines()
        lines[number - 1] = text
        (folder / "annotated.jsonl").write_text("\n".join(lines) + "\n")

    return spoil


def with_setting(section: str, name: str, value: Any) -> Spoil:
    return lambda folder, tree: tree.setdefault(section, {}).__setitem__(name, value)


def without_setting(folder: Path, tree: dict[str, Any]) -> None:
    del tree["data"]["annotated"]


def with_hf_field(name: str, value: Any) -> Spoil:
    def spoil(folder: Path, tree: dict[str, Any]) -> None:
        path = folder / "checkpoint" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return spoil


def with_foreign_tokenizer(folder: Path, tree: dict[str, Any]) -> None:
    path = folder / "checkpoint" / "tokenizer.json"
    rules = json.loads(path.read_text())
    token = {**rules["added_tokens"][0], "id": 104, "content": "<one more>"}
    path.write_text(json.dumps({**rules, "added_tokens": [*rules["added_tokens"], token]}))


def without_weights(folder: Path, tree: dict[str, Any]) -> None:
    (folder / "checkpoint" / "model.safetensors").unlink()


CASES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "missing field": (with_line(3, '{"prompt": "sort 21"}'), ("annotated.jsonl:3: ", "`response` is missing")),
    "broken JSON": (with_line(5, '{"prompt": '), ("annotated.jsonl:5: ", "not valid JSON", "column")),
    "missing setting": (without_setting, ("config.yaml: ", "`data.annotated` is missing", "--annotated")),
    "unknown key": (with_setting("optimizer", "leraning_rate", 1.0), ("config.yaml: ", "`optimizer.leraning_rate`")),
    "near key": (with_setting("optimizer", "weight_dekay", 0.1), ("did you mean `optimizer.weight_decay`?",)),
    "wrong type": (
        with_setting("training", "epochs", "two"),
        ("config.yaml: ", "`training.epochs` = 'two'", "integer"),
    ),
    "impossible layout": (
        with_setting("parallel", "pipeline_model_parallel_size", 4),
        ("parallel.pipeline_model_parallel_size = 4", "2 layers", "checkpoint"),
    ),
    "tokenizer": (with_foreign_tokenizer, ("tokenizer.json: ", "104", "vocab_size in ", "--tokenizer-model")),
    "missing file": (with_setting("data", "held_out", "nowhere.jsonl"), ("nowhere.jsonl: no such file",)),
    "missing weights": (without_weights, ("checkpoint: no *.safetensors",)),
    "unknown HF field": (
        with_hf_field("attn_logit_softcapping", 50.0),
        ("config.json: ", "`attn_logit_softcapping` = 50.0"),
    ),
    "unknown family": (with_hf_field("model_type", "mamba"), ("config.json: ", "model_type = 'mamba'", "llama")),
    "scorer": (with_setting("evaluation", "scorer", "nowhere.py:score"), ("nowhere.py: no such file", "scorer")),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line(case: str, world: World) -> None:
    spoil, words = CASES[case]
    spoil(world.folder, world.tree)
    done = world.run()
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("tspin: error: ") and [word for word in words if word not in line] == []
    assert done.stdout == ""
    assert not world.run_dir.exists()


def test_everything_that_is_wrong_is_said_at_once(world: World) -> None:
    for case in ("missing field", "broken JSON", "impossible layout", "tokenizer", "unknown HF field", "scorer"):
        CASES[case][0](world.folder, world.tree)
    done = world.run()
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 5  # an unknown field leaves the layout unjudged
    assert not world.run_dir.exists()


def test_over_long_prompts_are_found_before_a_model_is_loaded(world: World) -> None:
    for number in (4, 7):
        with_line(number, json.dumps({"id": f"long-{number}", "prompt": "sort " + "12 " * 20, "response": "1"}))(
            world.folder, world.tree
        )
    world.env = environment()  # transformers' tokenizers bring torch into this stage
    done = world.run()
    assert done.returncode == 2
    for number in (4, 7):
        assert f"annotated.jsonl:{number}: " in done.stderr and f"long-{number}" in done.stderr
    assert "--seq-length" in done.stderr
    assert not list(world.run_dir.glob("stages/*")) and not (world.run_dir / "initial").exists()
    assert not list(world.run_dir.glob("data/*"))
    # Nothing was done yet, so what the message asks for needs no new folder.
    again = world.run("--dry-run", "--seq-length", "120")
    assert again.returncode == 0, again.stderr


def test_other_settings_than_the_run_began_with(base_run: Path, world: World) -> None:
    before = {path: path.stat().st_mtime_ns for path in base_run.rglob("*")}
    done = tspin("run", "--config", base_run / "run.yaml", "--lr", "0.5", "--tspin-alpha", "2", env=world.env)
    assert done.returncode == 2
    assert "run.yaml: the run began with other settings" in done.stderr
    assert "optimizer.lr: 0.001 in the run, 0.5 now" in done.stderr
    assert "objective.alpha: 0.3 in the run, 2.0 now" in done.stderr
    assert not (world.folder / "torch_was_imported").exists()
    assert {path: path.stat().st_mtime_ns for path in base_run.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tspin-iteratons", "2"), ("--tspin-iteratons",)),
        (("--lr", "fast"), ("--lr", "'fast'")),
        (("--optimizer", "lion"), ("--optimizer", "'lion'", "rmsprop")),
        (("--lr", "-1"), ("optimizer.lr", "-1.0", "greater than 0")),
    ],
)
def test_bad_flags(arguments: tuple[str, ...], words: tuple[str, ...], world: World) -> None:
    done = world.run(*arguments)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert [word for word in words if word not in last] == []
    assert not world.run_dir.exists()
