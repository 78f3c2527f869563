from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tspin.config import Config
from megatron_tspin.selfplay.plan import Stage, plan

ConfigOf = Callable[..., Config]


def by_name(config: Config) -> dict[str, Stage]:
    return {stage.name: stage for stage in plan(config)}


def relative(paths: tuple[Path, ...], config: Config) -> set[str]:
    run_dir = Path(config.run_dir)
    return {str(path.relative_to(run_dir)) if path.is_relative_to(run_dir) else path.name for path in paths}


@pytest.mark.parametrize("method", ["tspin", "spin", "tspin_ref", "sft"])
def test_names_and_order(config_of: ConfigOf, method: str) -> None:
    names = [stage.name for stage in plan(config_of(objective__method=method))]
    iterations = ["rollout_000", "train_000", "rollout_001", "train_001", "rollout_002"]
    assert names == ["tokenize", "convert", *iterations, "export", "report"]


@pytest.mark.parametrize(
    ("method", "first", "second", "last"),
    [
        ("tspin", {"proto", "data/train_proto_document.json", "y'"}, {"y'"}, set()),
        ("tspin_ref", {"proto", "data/train_proto_document.json", "y'"}, {"y'"}, set()),
        ("spin", {"y'"}, {"y'"}, set()),
        ("sft", set(), set(), set()),
    ],
)
def test_what_rollouts_write(
    config_of: ConfigOf, method: str, first: set[str], second: set[str], last: set[str]
) -> None:
    config = config_of(objective__method=method)
    stages = by_name(config)
    for iteration, expected in enumerate((first, second, last)):
        if "y'" in expected:
            folder = f"iteration_{iteration:03d}"
            expected = expected - {"y'"} | {f"{folder}/synthetic", f"{folder}/train_synthetic_document.json"}
        expected = expected | {f"evaluation/policy_{iteration:03d}.json"}
        assert relative(stages[f"rollout_{iteration:03d}"].outputs, config) == expected


def test_nothing_is_evaluated_without_held_out_data(config_of: ConfigOf) -> None:
    config = config_of(data__held_out=None)
    for stage in plan(config):
        assert not any("evaluation" in str(path) for path in (*stage.inputs, *stage.outputs))
        assert not any("held_out" in path.name for path in (*stage.inputs, *stage.outputs))
    assert by_name(config)["rollout_002"].outputs == ()


@pytest.mark.parametrize(
    ("method", "reads", "writes_reference"),
    [
        ("tspin", {"iteration_001/train_synthetic_document.json", "data/train_proto_document.json"}, False),
        ("spin", {"iteration_001/train_synthetic_document.json"}, True),
        ("tspin_ref", {"iteration_001/train_synthetic_document.json", "data/train_proto_document.json"}, True),
        ("sft", set(), False),
    ],
)
def test_what_training_reads(config_of: ConfigOf, method: str, reads: set[str], writes_reference: bool) -> None:
    config = config_of(objective__method=method)
    stage = by_name(config)["train_001"]
    always = {
        "iteration_000/checkpoint",
        "data/train_prompt_document.json",
        "data/train_annotated_document.json",
    }
    assert relative(stage.inputs, config) == always | reads
    outputs = relative(stage.outputs, config)
    assert {"iteration_001/checkpoint", "iteration_001/metrics.jsonl"} <= outputs
    assert ("iteration_001/reference.jsonl" in outputs) == writes_reference


@pytest.mark.parametrize(
    ("precision", "measured"),
    [
        ({}, False),
        ({"precision__bf16": True}, True),
        ({"precision__bf16": True, "precision__rescored_prompts": 0}, False),
    ],
)
def test_training_in_low_precision_writes_its_noise(
    config_of: ConfigOf, precision: dict[str, object], measured: bool
) -> None:
    config = config_of(**precision)
    stages = by_name(config)
    for iteration in range(2):
        path = f"iteration_{iteration:03d}/precision.json"
        assert (path in relative(stages[f"train_{iteration:03d}"].outputs, config)) == measured
        assert (path in relative(stages["report"].inputs, config)) == measured


def test_every_input_inside_the_run_was_written_by_an_earlier_stage(config_of: ConfigOf) -> None:
    for method in ("tspin", "spin", "tspin_ref", "sft"):
        config = config_of(objective__method=method)
        written: set[Path] = set()
        for stage in plan(config):
            inside = {path for path in stage.inputs if path.is_relative_to(config.run_dir)}
            assert inside <= written, stage.name
            assert not written & set(stage.outputs), stage.name
            written |= set(stage.outputs)


def test_worlds_follow_the_layouts(config_of: ConfigOf) -> None:
    config = config_of(
        parallel__tensor_model_parallel_size=2,
        parallel__data_parallel_size=2,
        generation__tensor_model_parallel_size=1,
        generation__data_parallel_size=2,
    )
    worlds = {stage.name: stage.world_size for stage in plan(config)}
    assert worlds["tokenize"] == worlds["report"] == 1
    assert worlds["convert"] == worlds["train_000"] == worlds["export"] == 4
    assert worlds["rollout_000"] == 2


def test_a_scorer_of_an_installed_module_is_no_input_file(config_of: ConfigOf, world: Path) -> None:
    assert world / "scorer.py" in by_name(config_of())["rollout_000"].inputs
    stage = by_name(config_of(evaluation__scorer="json:loads"))["rollout_000"]
    assert not any(path.suffix == ".py" for path in stage.inputs)
