"""The config: files and flags, what is refused and how, and that writing it out loses nothing."""

import argparse
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from megatron_tspin.config import Config, GenerationSection, OptimizerSection, ParallelSection, default_row_capacity
from megatron_tspin.config_section import Affects, setting
from megatron_tspin.config_source import add_assignments, add_flags, dump_config, load_config, overrides, settings
from megatron_tspin.errors import InputError
from megatron_tspin.yaml_source import format_yaml, parse_yaml

NEEDED = {"run_dir": "run", "model.hf_checkpoint": "hf", "data.annotated": "a.jsonl"}
VLLM = {"generation.engine": "vllm"}


def refused(tree: Any, flags: dict[str, Any], folder: Path) -> list[str]:
    path = folder / "run.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    with pytest.raises(InputError) as caught:
        load_config(path, flags)
    return str(caught.value).replace(f"{path}: ", "").splitlines()


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: r\nmodel: {hf_checkpoint: h}\ndata: {annotated: a}\noptimizer: {lr: 1e-6, eps: 1e-7}\n")
    config = load_config(path, {"optimizer.lr": 2e-6})
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.min_lr) == (2e-6, 1e-7, 0.0)


@pytest.mark.parametrize("text", ["optimizer:\n", "optimizer: {}\n", "optimizer: null\n", ""])
def test_a_heading_without_settings_takes_flags(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: run\n{text}")
    flags = {name: value for name, value in NEEDED.items() if name != "run_dir"}
    assert load_config(path, {**flags, "optimizer.lr": 2e-6}).optimizer.lr == 2e-6


def test_refusals_by_name(tmp_path: Path) -> None:
    tree = {
        "run_dir": "run",
        "model": {"hf_checkpoint": "hf"},
        "data": {"annotated": "a"},
        "optimizer": {"lrr": 1e-6, "lr": "1e-6 "},
        "training": {"micro_batch_size": 2.5},
        "precision": {"bf16": "yes"},
        "objective": {"method": "dpo"},
        "seq_length": 4,
    }
    lines = refused(tree, {}, tmp_path)
    assert "unknown setting `optimizer.lrr`; did you mean `optimizer.lr`?" in lines
    assert "unknown setting `seq_length`; did you mean `data.seq_length`?" in lines
    assert "`optimizer.lr` = '1e-6 ': input should be a valid number" in lines
    assert "`training.micro_batch_size` = 2.5: input should be a valid integer" in lines
    assert "`precision.bf16` = 'yes': input should be a valid boolean" in lines
    assert "`objective.method` = 'dpo': input should be 'tspin', 'spin', 'tspin_ref' or 'sft'" in lines
    assert len(lines) == 6


def test_missing_settings_name_their_flags(tmp_path: Path) -> None:
    assert refused({"data": {}}, {}, tmp_path) == [
        "`run_dir` is missing; set it in the file or with --run-dir",
        "`model` is missing; set it in the file or with --hf-checkpoint",
        "`data.annotated` is missing; set it in the file or with --annotated",
    ]
    with pytest.raises(InputError, match="^the command line: `run_dir` is missing"):
        load_config(None, {})


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            {
                "training.layout": "padded",
                "training.global_batch_size": 10,
                "training.micro_batch_size": 4,
            },
            "training.global_batch_size (10) must be a multiple of micro_batch_size x data_parallel_size (4 x 1)",
        ),
        (
            {"generation.max_new_tokens": 2048},
            "generation.max_new_tokens (2048) must be smaller than data.seq_length (2048), which has to hold the "
            "prompt too",
        ),
        (
            {"parallel.sequence_parallel": True},
            "parallel: sequence_parallel needs tensor_model_parallel_size of 2 or more",
        ),
        (
            {"parallel.context_parallel_size": 2, "training.layout": "padded"},
            "context_parallel_size above 1 needs training.layout = packed",
        ),
        (
            {
                "parallel.pipeline_model_parallel_size": 2,
                "parallel.virtual_pipeline_model_parallel_size": 2,
                "training.layout": "padded",
            },
            "virtual_pipeline_model_parallel_size needs training.layout = packed",
        ),
        (
            {"parallel.virtual_pipeline_model_parallel_size": 2},
            "parallel: virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size of 2 or more",
        ),
        (
            {"parallel.overlap_param_gather": True, "parallel.overlap_grad_reduce": True},
            "parallel: overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce",
        ),
        ({"data.template": "no prompt"}, "data: template must be `chat` or contain {prompt} exactly once"),
        (
            {"optimizer.lr_by_iteration": [1e-6, 0.0]},
            "optimizer: learning rates must be positive and finite, found [1e-06, 0.0]",
        ),
        ({"optimizer.lr": float("inf")}, "optimizer: learning rates must be positive and finite, found [inf]"),
        (
            {"optimizer.lr": 1e-6, "optimizer.min_lr": 1e-5},
            "optimizer: min_lr (1e-05) must not exceed the lowest peak learning rate (1e-06)",
        ),
        ({"optimizer.lr": float("nan")}, "`optimizer.lr` = nan: input should be greater than 0"),
        (
            {"generation.server_urls": ["http://a:1"]},
            "generation: server_urls and vllm_arguments need engine = vllm (--tspin-generation-engine)",
        ),
        (
            {**VLLM, "generation.data_parallel_size": 2},
            "generation: data_parallel_size above 1 with engine = vllm needs server_urls (--tspin-server-url): a "
            "server that the stage starts is spread over GPUs by vllm_arguments",
        ),
        (
            {**VLLM, "generation.server_urls": ["localhost:8000"]},
            "generation.server_urls: 'localhost:8000' is no address of a server; write it as http://host:8000",
        ),
        (
            {**VLLM, "generation.server_urls": ["http://a:1/v1"]},
            "generation.server_urls: 'http://a:1/v1': leave out /v1, which is added where vLLM has it",
        ),
        (
            {**VLLM, "generation.server_urls": ["http://a:1", "http://a:1/"]},
            "generation.server_urls: a server is named twice: http://a:1, http://a:1/",
        ),
        (
            {**VLLM, "precision.rescored_prompts": 0},
            "generation.engine = vllm needs precision.rescored_prompts of 1 or more: what another engine says of its "
            "answers is scored again before they are trained on",
        ),
    ],
)
def test_combinations(flags: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(None, {**NEEDED, **flags})
    assert str(caught.value) == f"the command line: {expected}"


@pytest.mark.parametrize("text", ["generation: 3\n", "generation: {max_new_tokens: -1, nonsense: 2}\n", "data: {}\n"])
def test_what_a_command_never_reads_is_neither_demanded_nor_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{hf_checkpoint: hf}}\n{text}")
    config = load_config(path, {"data.seq_length": 32}, unread=("run_dir", "data.annotated", "generation"))
    assert (config.run_dir, config.data.annotated, config.data.seq_length) == ("", "", 32)
    assert config.generation == GenerationSection()
    with pytest.raises(InputError, match="`run_dir` is missing"):
        load_config(path, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n", "expected sections such as `model:` and `data:`, found list"),
        ("a: [\n", "not valid YAML"),
        ("", "expected sections such as `model:` and `data:`, found NoneType"),
        ("optimizer: 3\n", "`optimizer` = 3: input should be a valid dictionary or instance of OptimizerSection"),
    ],
)
def test_files_that_are_no_config(text: str, expected: str, tmp_path: Path) -> None:
    assert any(expected in line for line in refused(text, {"optimizer.lr": 1e-6}, tmp_path))
    with pytest.raises(InputError, match="no such config file"):
        load_config(tmp_path / "absent.yaml", {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "optimizer: {lr: 1e-4}\nseed: 3\noptimizer: {eps: 1e-7}\n",
            "`optimizer` stands in line 1 and again in line 3",
        ),
        ("optimizer:\n  lr: 1e-4\n  eps: 1e-7\n  lr: 5e-7\n", "`lr` stands in line 2 and again in line 4"),
        ("optimizer: {lr: 1e-4, lr: 1e-4}\n", "`lr` stands in line 1 and again in line 1"),
        ("data: {annotated: &x {a: 1, a: 2}, held_out: *x}\n", "`a` stands in line 1 and again in line 1"),
        ("- [{a: 1, 'a': 2}]\n", "`a` stands in line 1 and again in line 1"),
    ],
)
def test_a_key_that_comes_twice_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    assert any(expected in line for line in refused(text, {}, tmp_path))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("0x1f", 31), ("0o17", 15), ("-1", -1), ("1:30", "1:30"), ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("yes", True), ("off", False), ("y", "y"), ("~", None), ("", None), ("=", "="), (".5", 0.5), ("1e6", 1e6),
        ("0o18", "0o18"),
        ("&x {b: 1}\nc: {<<: *x, d: 2}", {"b": 1}),
    ],
)  # fmt: skip
def test_yaml_is_read_as_people_mean_it(text: str, value: Any) -> None:
    found = parse_yaml(f"a: {text}", "here")["a"]
    assert found == value and type(found) is type(value)


@given(st.text(alphabet="01689ox._:-+eE~yYnNoOfFtTrRuU=<") | st.text())
def test_yaml_keeps_texts_as_texts(text: str) -> None:
    assert parse_yaml(format_yaml({"a": text, text: 1}), "here") == {"a": text, text: 1}


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "+1e-6", "0.000001", ".1e-5"])
def test_numbers_are_numbers(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: r\nmodel: {{hf_checkpoint: h}}\ndata: {{annotated: a}}\noptimizer: {{lr: {text}}}\n")
    assert load_config(path, {}).optimizer.lr == 1e-6


@examples(max_examples=40)
@given(
    lr=st.floats(1e-12, 1.0),
    rates=st.lists(st.floats(1e-12, 1.0), max_size=3),
    template=st.text().map(lambda text: text.replace("{prompt}", "") + "{prompt}"),
    name=st.text(),
    flag=st.booleans(),
    steps=st.none() | st.integers(1, 10**6),
)
@example(lr=1.0, rates=[], template="{prompt}\x85ä\u2028", name="\x85", flag=False, steps=None)
def test_writing_out_loses_nothing(
    tmp_path_factory: Any, lr: float, rates: list[float], template: str, name: str, flag: bool, steps: int | None
) -> None:
    try:
        config = load_config(
            None,
            {
                **NEEDED,
                "run_dir": name,
                "optimizer.lr": lr,
                "optimizer.lr_by_iteration": rates,
                "data.template": template,
                "precision.bf16": flag,
                "training.train_iters": steps,
            },
        )
        text = dump_config(config)
        text.encode("utf-8")
    except UnicodeEncodeError:
        return  # lone surrogates are in no file and on no command line
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_config(path, {}) == config


def test_every_flag_is_one_settings() -> None:
    flags = [item.flag for item in settings() if item.flag is not None]
    assert len(set(flags)) == len(flags)
    assert all(item.field.description for item in settings())


def test_every_setting_says_what_it_affects() -> None:
    kinds = {item.name: item.affects for item in settings()}
    assert set(kinds.values()) == set(typing.get_args(Affects))
    assert [name for name, kind in kinds.items() if kind == "extent"] == ["self_play.iterations"]
    for section, kind in (("optimizer", "result"), ("objective", "result"), ("parallel", "execution")):
        assert {kinds[name] for name in kinds if name.startswith(f"{section}.")} == {kind}
    with pytest.raises(TypeError, match="affects"):
        setting(1, "--x", "Does not say it.")  # type: ignore[call-arg]


def parsed(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    add_assignments(parser)
    return overrides(parser.parse_args(arguments))


def test_set_reaches_every_setting() -> None:
    """Also those without a flag, and values that no flag can give: none, and an empty list."""
    config = load_config(
        None,
        parsed(
            "--set", "run_dir=r", "--set", "model.hf_checkpoint=h", "--set", "data.annotated=a=b.jsonl",
            "--set", "generation.shard_size=3", "--set", "optimizer.lr=1e-6", "--set", "optimizer.lr_by_iteration=[]",
            "--set", "training.save_interval=null", "--set", 'data.template="### {prompt}"', "--bf16",
        ),
    )  # fmt: skip
    assert (config.data.annotated, config.data.template) == ("a=b.jsonl", "### {prompt}")
    assert (config.generation.shard_size, config.optimizer.lr, config.training.save_interval) == (3, 1e-6, None)
    assert config.precision.bf16
    for item in settings():
        assert parsed("--set", f"{item.name}=1") == {item.name: 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "optimizer.lrr=1"), "--set optimizer.lrr=1: unknown setting `optimizer.lrr`; did you mean `optimi"),
        (("--set", "seq_length=1"), "unknown setting `seq_length`; did you mean `data.seq_length`?"),
        (("--set", "optimizer={lr: 1}"), "unknown setting `optimizer`"),
        (("--set", "optimizer.lr"), "--set optimizer.lr: expected SECTION.KEY=VALUE"),
        (("--set", "optimizer.lr=["), "--set optimizer.lr=[: not valid YAML"),
        (("--lr", "1e-6", "--set", "optimizer.lr=1e-6"), "optimizer.lr is given twice on the command line"),
        (("--set", "seed=1", "--set", "seed=2"), "--set seed=2: seed is given twice on the command line"),
    ],
)
def test_refused_assignments(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parsed(*arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "again", [("--lr", "1e-6", "--lr", "2e-6"), ("--bf16", "--no-bf16"), ("--seed", "1", "--seed", "1")]
)
def test_a_flag_that_comes_twice_is_refused(again: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*again)
    assert "given twice; leave one of them out" in capsys.readouterr().err


def test_flags_parse_to_the_types_of_the_settings() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    given_flags = (
        "--run-dir r --hf-checkpoint h --annotated a --lr 1e-6 --tspin-lr-by-iteration 2e-6 1e-6 --bf16 "
        "--no-tspin-tensorboard --train-iters 7 --tspin-method spin --tensor-model-parallel-size 2 --sequence-parallel"
    )
    found = overrides(parser.parse_args(given_flags.split()))
    config = load_config(None, found)
    assert set(found) == {
        "run_dir", "model.hf_checkpoint", "data.annotated", "optimizer.lr", "optimizer.lr_by_iteration",
        "precision.bf16", "training.tensorboard", "training.train_iters", "objective.method",
        "parallel.tensor_model_parallel_size", "parallel.sequence_parallel",
    }  # fmt: skip
    assert config.precision.bf16 and not config.training.tensorboard and config.training.train_iters == 7
    assert config.objective.method == "spin" and config.optimizer.lr_by_iteration == [2e-6, 1e-6]


def test_only_some_sections() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, ("", "objective"))
    offered = {action.dest for action in parser._actions} - {"help"}
    assert offered == {item.name for item in settings() if len(item.path) == 1 or item.path[0] == "objective"}


def test_learning_rates_by_iteration() -> None:
    assert OptimizerSection(lr=3e-6).peak_lr(7) == 3e-6
    section = OptimizerSection(lr=3e-6, lr_by_iteration=[2e-6, 1e-6])
    assert [section.peak_lr(i) for i in range(4)] == [2e-6, 1e-6, 1e-6, 1e-6]


def test_generation_layout() -> None:
    config = load_config(
        None,
        {
            **NEEDED,
            "parallel.tensor_model_parallel_size": 4,
            "parallel.sequence_parallel": True,
            "parallel.cpu_threads": 3,
            "generation.tensor_model_parallel_size": 1,
            "generation.data_parallel_size": 4,
        },
    )
    assert config.generation_layout() == ParallelSection(data_parallel_size=4, cpu_threads=3)


@pytest.mark.parametrize(
    ("training", "generation", "folded", "staged"),
    [
        ({"pipeline": 2, "context": 2, "data": 3}, {}, (1, 1, 12), (1, 2, 6)),
        ({"tensor": 2, "pipeline": 2}, {}, (2, 1, 2), (2, 2, 1)),
        ({"tensor": 2, "pipeline": 2}, {"tensor": 1}, (1, 1, 4), (1, 2, 2)),
        ({"pipeline": 4}, {"pipeline": 2}, (1, 2, 2), (1, 2, 2)),
        ({"data": 2}, {"tensor": 4}, (4, 1, 1), (4, 1, 1)),
    ],
    ids=str,
)
def test_generation_takes_all_of_trainings_ranks(
    training: dict[str, int], generation: dict[str, int], folded: tuple[int, ...], staged: tuple[int, ...]
) -> None:
    names = {"tensor": "tensor_model_parallel_size", "pipeline": "pipeline_model_parallel_size"}
    names |= {"context": "context_parallel_size", "data": "data_parallel_size"}
    given = {f"parallel.{names[key]}": value for key, value in training.items()}
    given |= {f"generation.{names[key]}": value for key, value in generation.items()}
    config = load_config(None, {**NEEDED, **given})
    for wanted, found in ((folded, config.generation_layout()), (staged, config.generation_layout(folded=False))):
        layout = [getattr(found, names[key]) for key in ("tensor", "pipeline", "data")]
        assert layout == list(wanted) and found.context_parallel_size == 1


def test_vllm_needs_one_rank_unless_more_are_asked_for() -> None:
    """Whatever training has: the ranks only hold the policy, and the servers have GPUs of their own."""
    training = {"parallel.tensor_model_parallel_size": 2, "parallel.data_parallel_size": 4}
    assert load_config(None, {**NEEDED, **training, **VLLM}).generation_layout() == ParallelSection()
    wanted = {"generation.server_urls": ["http://a:1"], "generation.data_parallel_size": 3}
    wanted |= {"generation.tensor_model_parallel_size": 2}
    found = load_config(None, {**NEEDED, **training, **VLLM, **wanted}).generation_layout()
    assert found == ParallelSection(data_parallel_size=3, tensor_model_parallel_size=2)


def test_what_another_engine_samples_is_rescored_in_every_format() -> None:
    kinds: dict[str, dict[str, Any]] = {
        "fp32": {}, "bf16": {"precision.bf16": True}, "vllm": VLLM, "sft": {**VLLM, "objective.method": "sft"},
        "neither": {**VLLM, "objective.method": "sft", "precision.rescored_prompts": 0},
    }  # fmt: skip
    found = {name: load_config(None, {**NEEDED, **given}) for name, given in kinds.items()}
    assert [name for name, config in found.items() if config.rescores] == ["bf16", "vllm"]
    assert [name for name, config in found.items() if config.bounds_drift] == ["vllm"]


def test_packed_batches_may_have_any_size() -> None:
    found = load_config(None, {**NEEDED, "training.global_batch_size": 10, "parallel.data_parallel_size": 4})
    assert found.training.layout == "packed" and found.training.global_batch_size == 10


@pytest.mark.parametrize(
    ("parallel", "multiple"),
    [
        ({}, 8),
        ({"context_parallel_size": 2}, 8),
        ({"context_parallel_size": 3}, 24),  # two chunks a rank
        ({"tensor_model_parallel_size": 3}, 8),
        ({"tensor_model_parallel_size": 3, "sequence_parallel": True}, 24),
        ({"tensor_model_parallel_size": 16, "sequence_parallel": True}, 16),
        ({"tensor_model_parallel_size": 6, "sequence_parallel": True, "context_parallel_size": 4}, 24),
        ({"tensor_model_parallel_size": 8, "sequence_parallel": True, "context_parallel_size": 2}, 16),
    ],
)
def test_lengths_of_rows_suit_the_layout(parallel: dict[str, Any], multiple: int) -> None:
    assert ParallelSection(**parallel).row_length_multiple() == multiple


@given(
    seq_length=st.integers(17, 300),
    micro_batch_size=st.integers(1, 6),
    context=st.integers(1, 4),
    tensor=st.integers(1, 4),
)
def test_rows_hold_any_triplet_by_default(seq_length: int, micro_batch_size: int, context: int, tensor: int) -> None:
    """Three responses that fill the sequence, each with its prompt, whatever rows are cut down to."""
    config = load_config(
        None,
        {
            **NEEDED,
            "data.seq_length": seq_length,
            "generation.max_new_tokens": 16,
            "training.micro_batch_size": micro_batch_size,
            "parallel.context_parallel_size": context,
            "parallel.tensor_model_parallel_size": tensor,
            "parallel.sequence_parallel": tensor > 1,
        },
    )
    multiple = config.row_length_multiple
    most = config.row_capacity // multiple * multiple
    least = max(3, micro_batch_size) * seq_length
    assert least <= most
    if least >= 2048:
        assert most < least + multiple


@pytest.mark.parametrize(
    ("micro_batch_size", "seq_length", "expected"),
    [(4, 128, 1536), (8, 128, 2048), (1, 128, 384), (2, 1024, 3072), (20, 128, 2560)],
)
def test_rows_of_short_sequences_are_no_shorter_than_pays(
    micro_batch_size: int, seq_length: int, expected: int
) -> None:
    """As many tokens as a padded micro-batch has, up to 2048; or those of a triplet and of the micro-batch size."""
    assert default_row_capacity(micro_batch_size, seq_length) == expected


def test_a_dotted_name_in_a_file_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: r\nmodel: {hf_checkpoint: h}\ndata: {annotated: a}\nobjective.alpha: 0.3\n")
    with pytest.raises(
        InputError, match="unknown setting `objective.alpha`; write `objective:` and below it, indented"
    ):
        load_config(path, {})


def test_configs_are_immutable() -> None:
    config: Any = Config.model_validate({"run_dir": "r", "model": {"hf_checkpoint": "h"}, "data": {"annotated": "a"}})
    with pytest.raises(ValueError, match="frozen"):
        config.optimizer.lr = 1.0
