"""HF configs: what is not implemented is refused by name, what does not matter passes."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import ParallelSection
from megatron_tspin.errors import InputError
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families.registry import FAMILIES
from megatron_tspin.models.families.rope_settings import rope_settings
from megatron_tspin.models.hf_config import read_architecture

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "num_key_value_heads": 2}


def read(folder: Path, config: Any) -> Architecture:
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


def refusal(folder: Path, config: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        read(folder, config)
    return str(caught.value).replace(f"{folder / 'config.json'}: ", "").splitlines()


RELU = (
    "hidden_act = 'relu' is not implemented; implemented are silu, swish, gelu, gelu_python, gelu_pytorch_tanh, "
    "gelu_new, gelu_fast"
)
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, f"model_type = 'gpt2' is not implemented; implemented are {', '.join(FAMILIES)}"),
    (
        {"model_type": "deepseek_v3"},
        "model_type = 'deepseek_v3' is not implemented; nor are its latent attention, shared experts and expert "
        f"biases; implemented are {', '.join(FAMILIES)}",
    ),
    ({"hidden_act": "relu"}, RELU),
    ({"attention_bias": "yes"}, "`attention_bias` = 'yes' must be true or false"),
    (
        {"rope_scaling": {"type": "own", "factor": 2.0}},
        "rope type 'own' is not implemented; implemented are default, linear, dynamic, llama3, yarn, longrope",
    ),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "mystery": 3}},
        "`mystery` = 3 among the rope settings is not understood",
    ),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not implemented"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not implemented"),
    (
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        "layer_types has sliding_attention; implemented are full_attention",
    ),
    (
        {"quantization_config": {"bits": 4}},
        "`quantization_config` = {'bits': 4} says that the weights are quantised; take the "
        "unquantised checkpoint, or dequantise it with transformers (`model.dequantize()`) and save it again",
    ),
    (
        {"logit_scale": 0.0625},
        "`logit_scale` = 0.0625 is not understood, so the computation might differ; remove the key if it is unused",
    ),
    ({"hidden_size": None}, "`hidden_size` = None must be a whole number above 0"),
    ({"num_attention_heads": 0}, "`num_attention_heads` = 0 must be a whole number above 0"),
    ({"vocab_size": "101"}, "`vocab_size` = '101' must be a whole number above 0"),
]


@pytest.mark.parametrize(("change", "expected"), REFUSALS, ids=[next(iter(change)) for change, _ in REFUSALS])
def test_refusals(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, {**LLAMA, **change}) == [expected]


def test_all_problems_come_at_once_with_the_file(tmp_path: Path) -> None:
    config = {**LLAMA, "mlp_bias": 1, "hidden_act": "relu"}
    del config["vocab_size"], config["rms_norm_eps"]
    with pytest.raises(InputError) as caught:
        read(tmp_path, config)
    path = tmp_path / "config.json"
    assert str(caught.value).splitlines() == [
        f"{path}: `vocab_size` is missing",
        f"{path}: `mlp_bias` = 1 must be true or false",
        f"{path}: `rms_norm_eps` is missing",
        f"{path}: {RELU}",
    ]


def test_files_that_are_no_config(tmp_path: Path) -> None:
    assert refusal(tmp_path, []) == ["expected a JSON object, found list"]
    with pytest.raises(InputError, match="model.hf_checkpoint must be a folder with config.json"):
        read_architecture(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json: not valid JSON"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="config.json: no such file"):
        read_architecture(tmp_path)


def test_neutral_keys_pass(tmp_path: Path) -> None:
    neutral = {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "use_cache": True,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "attention_dropout": 0.0,
        "rope_interleaved": False,
        "some_new_option": None,
        "pruned_heads": {},
        "hidden_act": "silu",
        "layer_types": ["full_attention"] * 4,
        "partial_rotary_factor": 1.0,
    }
    assert read(tmp_path, {**LLAMA, **neutral}) == read(tmp_path, LLAMA)


def test_what_a_silent_config_means(tmp_path: Path) -> None:
    """Checked against transformers' own classes."""
    import transformers

    for config, family in ((LLAMA, "Llama"), (MISTRAL, "Mistral")):
        for silent in (False, True):
            given = {key: value for key, value in config.items() if not (silent and key == "num_key_value_heads")}
            if silent:
                given["num_attention_heads"], given["hidden_size"] = 16, 128
            theirs = getattr(transformers, f"{family}Config")(**{k: v for k, v in given.items() if k != "model_type"})
            ours = read(tmp_path, given)
            assert ours.num_kv_heads == theirs.num_key_value_heads
            assert ours.shortest_window == getattr(theirs, "sliding_window", None)
            assert ours.tied_embeddings == theirs.tie_word_embeddings
            assert ours.head_dim == (theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads)
            assert rope_settings(given)["rope_theta"] == theirs.rope_parameters["rope_theta"]


def test_sliding_window(tmp_path: Path) -> None:
    assert read(tmp_path, MISTRAL).shortest_window == 4096
    assert read(tmp_path, {**MISTRAL, "sliding_window": None}).shortest_window is None
    assert read(tmp_path, {**MISTRAL, "sliding_window": 8}).shortest_window == 8
    assert read(tmp_path, {**LLAMA, "sliding_window": 8}).shortest_window is None
    assert refusal(tmp_path, {**MISTRAL, "sliding_window": 8, "layer_types": ["full_attention"] * 4}) == [
        "layer_types has full_attention; implemented are sliding_attention"
    ]


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
    ],
)
def test_rope_settings_of_all_versions_of_transformers(written: dict[str, Any]) -> None:
    found = rope_settings(written)
    assert (found["rope_type"], found["factor"], found["rope_theta"]) == ("linear", 4.0, 5e5)


def test_padded_vocabulary(tmp_path: Path) -> None:
    sizes = {tp: read(tmp_path, {**LLAMA, "vocab_size": 32000}).padded_vocab_size(tp) for tp in (1, 2, 8, 3, 256)}
    assert sizes == {1: 32000, 2: 32000, 8: 32000, 3: 32256, 256: 32000}
    assert [read(tmp_path, LLAMA).padded_vocab_size(tp) for tp in (1, 2, 128)] == [128] * 3


def test_layouts_that_do_not_fit(tmp_path: Path) -> None:
    architecture = read(tmp_path, {**LLAMA, "num_key_value_heads": 2})
    for fits in ((1, 1), (2, 4), (4, 1)):
        architecture.check_layout(
            ParallelSection(tensor_model_parallel_size=fits[0], pipeline_model_parallel_size=fits[1])
        )
    with pytest.raises(InputError) as caught:
        architecture.check_layout(ParallelSection(tensor_model_parallel_size=3, pipeline_model_parallel_size=3))
    assert str(caught.value).splitlines() == [
        f"parallel.tensor_model_parallel_size = 3 does not divide the 4 attention heads of {tmp_path}; "
        "use a divisor of 4",
        f"parallel.tensor_model_parallel_size = 3 does not divide the 64 MLP columns of {tmp_path}; use a divisor of "
        "64",
        f"parallel.pipeline_model_parallel_size = 3 does not divide the 4 layers of {tmp_path}; use a divisor of 4",
        f"parallel.tensor_model_parallel_size = 3 neither divides the 2 key-value heads of {tmp_path} nor is a "
        "multiple of them; use a divisor or a multiple of 2",
    ]
    virtual = ParallelSection(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    architecture.check_layout(virtual)
    with pytest.raises(InputError) as caught:
        architecture.check_layout(virtual.model_copy(update={"virtual_pipeline_model_parallel_size": 3}))
    assert str(caught.value) == (
        "parallel.pipeline_model_parallel_size x virtual_pipeline_model_parallel_size = 6 does not divide the 4 layers "
        f"of {tmp_path}; use a divisor of 4"
    )
