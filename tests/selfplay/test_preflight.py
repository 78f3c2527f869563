import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron_tspin.config import Config
from megatron_tspin.errors import InputError
from megatron_tspin.selfplay import disk_space
from megatron_tspin.selfplay.preflight import preflight
from megatron_tspin.selfplay.weights import count_parameters
from tests.data.tokenizer_kinds import sentencepiece_model
from tests.generation.fake_vllm_python import write_python
from tests.selfplay.fake_world import PARAMETERS, shapes_of, write_safetensors

ConfigOf = Callable[..., Config]


def refused(config: Config) -> list[str]:
    with pytest.raises(InputError) as caught:
        preflight(config)
    return str(caught.value).splitlines()


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_good_world_passes(config_of: ConfigOf) -> None:
    preflight(config_of())


def test_all_problems_are_in_one_report(world: Path, config_of: ConfigOf) -> None:
    (world / "train.jsonl").write_text('{"prompt": "x"}\nnot json\n')
    (world / "scorer.py").write_text("def other():\n    pass\n")
    (world / "base" / "model.safetensors").unlink()
    change_json(world / "base" / "config.json", vocab_size=5)
    config = config_of(data__held_out=str(world / "absent.jsonl"), parallel__tensor_model_parallel_size=8)
    lines = refused(config)
    for words in (
        "train.jsonl:1", "train.jsonl:2", "absent.jsonl", "no *.safetensors", "attention heads",
        "largest token id is 5",         "no function 'score'",
    ):  # fmt: skip
        assert sum(words in line for line in lines) == 1, (words, lines)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"parallel__tensor_model_parallel_size": 3}, "2 key-value heads"),
        ({"parallel__pipeline_model_parallel_size": 4}, "2 layers"),
        ({"generation__pipeline_model_parallel_size": 4}, "(generation's layout)"),
        ({"model__hf_checkpoint": "/absent"}, "/absent: no such folder"),
        ({"model__tokenizer": "/absent"}, "/absent: no such tokenizer"),
        ({"data__template": "chat"}, "no chat template"),
        ({"evaluation__scorer": "/absent.py:score"}, "/absent.py: no such file"),
        ({"evaluation__scorer": "score"}, "expected `path/to/file.py:function`"),
        ({"evaluation__scorer": "no_such_module_here.inner:score"}, "no module no_such_module_here"),
    ],
)
def test_a_bad_setting(config_of: ConfigOf, settings: dict[str, Any], words: str) -> None:
    assert any(words in line for line in refused(config_of(**settings)))


def test_a_chat_template_may_be_in_either_place(world: Path, config_of: ConfigOf) -> None:
    settings = world / "base" / "tokenizer_config.json"
    settings.write_text('{"chat_template": "x"}')
    preflight(config_of(data__template="chat"))
    settings.unlink()
    (world / "base" / "chat_template.jinja").write_text("x")
    preflight(config_of(data__template="chat"))


def test_named_chat_templates_need_a_default(world: Path, config_of: ConfigOf) -> None:
    settings = world / "base" / "tokenizer_config.json"
    named = [{"name": name, "template": "x"} for name in ("rag", "tool_use")]
    settings.write_text(json.dumps({"chat_template": named}))
    (line,) = refused(config_of(data__template="chat"))
    assert line.startswith(f"{settings}: ") and "rag, tool_use" in line and "--template" in line
    settings.write_text(json.dumps({"chat_template": [*named, {"name": "default", "template": "x"}]}))
    preflight(config_of(data__template="chat"))


def test_a_sentencepiece_model_has_no_chat_template(world: Path, config_of: ConfigOf) -> None:
    (world / "base" / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    model = world / "x.model"
    model.write_bytes(sentencepiece_model("bpe"))
    lines = refused(config_of(data__template="chat", model__tokenizer=str(model)))
    assert any(line.startswith(f"{model}: ") and "--template" in line for line in lines)


def test_a_scorer_may_be_imported_or_assigned(world: Path, config_of: ConfigOf) -> None:
    for text in ("from json import loads as score", "score = len", "class score:\n    pass"):
        (world / "scorer.py").write_text(text)
        preflight(config_of())
    (world / "scorer.py").write_text("def score(:\n")
    assert "scorer.py:1: not valid Python" in refused(config_of())[0]


def test_a_scorer_is_not_run(world: Path, config_of: ConfigOf) -> None:
    (world / "scorer.py").write_text("raise SystemExit(9)\ndef score(record, response):\n    return 1.0\n")
    preflight(config_of())


@pytest.mark.processes
def test_vllm_is_looked_for_where_it_will_be_started(world: Path, config_of: ConfigOf) -> None:
    absent = config_of(generation__engine="vllm", generation__vllm_python=str(world / "python"))
    assert any("cannot be asked for its vLLM" in line for line in refused(absent))
    write_python(world)
    preflight(absent)
    urls = ["http://127.0.0.1:9"]
    preflight(config_of(generation__engine="vllm", generation__server_urls=urls))


def test_unsupported_family(world: Path, config_of: ConfigOf) -> None:
    change_json(world / "base" / "config.json", model_type="gpt_unknown")
    assert any("gpt_unknown" in line for line in refused(config_of()))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"vocab": 3}}'])
def test_a_broken_tokenizer(world: Path, config_of: ConfigOf, text: str) -> None:
    (world / "base" / "tokenizer.json").write_text(text)
    assert any("tokenizer.json" in line for line in refused(config_of()))


def test_a_broken_hf_config(world: Path, config_of: ConfigOf) -> None:
    (world / "base" / "config.json").write_text("{")
    lines = refused(config_of())
    assert len(lines) == 1 and "config.json" in lines[0]


def test_unigram_vocabularies_are_lists(world: Path, config_of: ConfigOf) -> None:
    rules = {"model": {"type": "Unigram", "vocab": [[f"a{i}", 0.0] for i in range(7)]}}
    (world / "base" / "tokenizer.json").write_text(json.dumps(rules))
    assert any("largest token id is 6" in line for line in refused(config_of()))


def test_a_sentencepiece_file_that_is_none(world: Path, config_of: ConfigOf) -> None:
    (world / "x.model").write_bytes(b"no model")
    assert any(
        "not a SentencePiece model" in line for line in refused(config_of(model__tokenizer=str(world / "x.model")))
    )


def test_truncated_and_missing_weights(world: Path, config_of: ConfigOf) -> None:
    weights = world / "base" / "model.safetensors"
    whole = weights.read_bytes()
    of_other_shape = whole.replace(b"[6, 8]", b"[6, 9]")
    for content in (whole[:0], whole[:4], whole[:20], whole[:-1], whole + b"x", of_other_shape):
        weights.write_bytes(content)
        (line,) = refused(config_of())
        assert "model.safetensors" in line and f"{len(content)} bytes" in line and "download it again" in line
    weights.unlink()
    (world / "base" / "model-00001.safetensors").write_bytes(whole)
    index = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    (world / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    (line,) = refused(config_of())
    assert "model-00002.safetensors: no such file" in line


def test_an_adapter_is_no_model(world: Path, config_of: ConfigOf) -> None:
    base = world / "base"
    (base / "model.safetensors").rename(base / "adapter_model.safetensors")
    (base / "adapter_config.json").write_text("{}")
    (line,) = refused(config_of())
    assert "base: this is a LoRA adapter (adapter_config.json), not a model; merge it into its base first" in line


def test_tensors_are_compared_with_the_config(world: Path, config_of: ConfigOf) -> None:
    shapes = shapes_of(world / "base")
    shapes["model.norm.weight"] = [9]
    shapes["model.extra"] = shapes.pop("model.layers.1.mlp.down_proj.weight")
    write_safetensors(world / "base" / "model.safetensors", shapes)
    assert refused(config_of()) == [
        f"{world / 'base'}: tensor model.layers.1.mlp.down_proj.weight is missing; config.json describes an "
        "architecture that has it",
        f"{world / 'base'}: tensor model.norm.weight has shape [9], config.json demands [8]",
        f"{world / 'base'}: tensor model.extra is left over; no part of the architecture in config.json takes it",
    ]


def test_parameters_are_counted_from_headers(world: Path) -> None:
    assert count_parameters(world / "base") == PARAMETERS
    write_safetensors(world / "base" / "more.safetensors", {"scalar": [], "b": [2, 3]})
    assert count_parameters(world / "base") == PARAMETERS, "model.safetensors alone counts, as in transformers"
    (world / "base" / "model.safetensors").rename(world / "base" / "first.safetensors")
    assert count_parameters(world / "base") == PARAMETERS + 1 + 6


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_disk_space(config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(training__save_interval=1, training__epochs=9)
    least, likely = disk_space.least_bytes(config, PARAMETERS), disk_space.likely_bytes(config, PARAMETERS, 3)
    assert (least, likely) == (4 * PARAMETERS * 4, 9 * PARAMETERS * 4)
    for free, outcome in ((least - 1, "refused"), (least, "warned"), (likely, "passed")):
        caplog.clear()
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(10**9, 0, free))
        if outcome == "refused":
            (line,) = refused(config)
            assert str(least) in line and str(free) in line
            continue
        with caplog.at_level("WARNING", logger="megatron_tspin"):
            preflight(config)
        assert ("optimizer states" in caplog.text) == (outcome == "warned")


def test_what_a_run_has_written_counts_as_available(
    world: Path, config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 0))
    assert refused(config_of())
    (world / "run").mkdir()
    (world / "run" / "x").write_bytes(bytes(disk_space.least_bytes(config_of(), PARAMETERS)))
    preflight(config_of())


@pytest.mark.parametrize(
    ("settings", "least", "likely"),
    [
        ({}, 5, 5),  # initial, exported, two last and best
        ({"data__held_out": None}, 4, 4),
        ({"self_play__keep_policies": 0}, 7, 7),
        ({"self_play__keep_policies": 1, "data__held_out": None}, 3, 3),
        ({"training__save_interval": 1}, 5, 1 + 3 + 1 + 3 * 2),  # one checkpoint more than is kept, with one moment
        ({"training__save_interval": 1, "optimizer__optimizer": "adam"}, 5, 1 + 3 + 1 + 3 * 3),
        ({"training__save_interval": 1, "precision__bf16": True}, 5, 1 + 3 + 1 + 3 * 2.5),
        ({"training__save_interval": 1, "training__keep_checkpoints": 1}, 5, 1 + 3 + 1 + 2 * 2),
        ({"training__save_interval": 1, "training__keep_checkpoints": 0}, 5, 1 + 3 + 1 + 9 * 2),
        ({"training__save_interval": 4, "training__keep_checkpoints": 0}, 5, 1 + 3 + 1 + 2 * 2),
        ({"training__save_interval": 10}, 5, 5),  # the iteration's last checkpoint alone
        ({"training__save_interval": 1, "training__train_iters": 2}, 5, 1 + 3 + 1 + 1 * 2),
    ],
    ids=str,
)
def test_disk_space_follows_the_retention(
    settings: dict[str, Any], least: float, likely: float, config_of: ConfigOf
) -> None:
    """In multiples of the fp32 weights; ten steps an iteration unless the settings say otherwise."""
    config = config_of(self_play__iterations=5, training__global_batch_size=8, training__epochs=5, **settings)
    assert disk_space.least_bytes(config, 56) == least * 56 * 4
    assert disk_space.likely_bytes(config, 56, num_examples=16) == likely * 56 * 4


@pytest.mark.parametrize(
    ("capacity", "over", "share", "fits"),
    [
        (61, "refuse", True, False),  # rows are multiples of 8
        (64, "refuse", True, True),
        (61, "truncate", True, True),
        (64, "refuse", False, False),
        (None, "refuse", False, True),
    ],
)
def test_a_row_has_to_hold_any_triplet_of_the_run(
    config_of: ConfigOf, capacity: int | None, over: str, share: bool, fits: bool
) -> None:
    """A row that turned out too short would stop the run after its first rollout."""
    rows = {"row_capacity": capacity, "over_capacity": over, "share_prompts": share}
    settings = {f"training__{name}": value for name, value in rows.items()}
    config = config_of(data__seq_length=32, generation__max_new_tokens=16, **settings)
    if fits:
        preflight(config)
    else:
        (line,) = refused(config)
        assert f"training.row_capacity = {capacity}" in line and "--tspin-row-capacity" in line


def test_a_run_needs_a_folder(world: Path, config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch) -> None:
    (world / "file").write_text("x")
    (world / "link").symlink_to(world / "nowhere")
    for name, message in {
        "file": "file is a file, so the run has no folder there",
        "file/run": "file is a file, so the run has no folder there",
        "link": "link is a link to nothing",
        "link/run": "link is a link to nothing",
    }.items():
        (line,) = refused(config_of(run_dir=str(world / name)))
        assert message in line
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != world)
    (line,) = refused(config_of(run_dir=str(world / "new" / "run")))
    assert f"{world} cannot be written to" in line
