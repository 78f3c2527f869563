"""A config.json means to us what it means to transformers, or it is refused: whatever somebody writes into it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_tspin.errors import InputError
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.models.hf_reading import check_reading
from megatron_tspin.models.rotary import RotaryFrequencies

EXAMPLES = int(os.environ.get("TSPIN_FUZZ_EXAMPLES", "60"))
"""More than that are drawn anew each time."""
BASE: dict[str, dict[str, Any]] = {
    family: {
        "model_type": family,
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
    }
    for family in ("llama", "mistral", "smollm3", "qwen2", "qwen3", "phi3", "granite", "gemma2", "olmo2", "mixtral")
}
ROPES = st.one_of(
    st.none(),
    st.just({}),
    st.fixed_dictionaries(
        {},
        optional={
            "rope_type": st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn", "longrope", "own"]),
            "type": st.sampled_from(["default", "linear", "dynamic"]),
            "factor": st.sampled_from([1.0, 2.0, 4]),
            "rope_theta": st.sampled_from([10000.0, 1e6, 7]),
            "partial_rotary_factor": st.sampled_from([1.0, 0.5]),
            "low_freq_factor": st.just(1.0),
            "high_freq_factor": st.just(4.0),
            "original_max_position_embeddings": st.sampled_from([16, 32]),
        },
    ),
)
VALUES = st.one_of(
    st.none(), st.booleans(), st.sampled_from([0, 1, 2, 3, 4, 8, 16, 64, 100, -1]), st.sampled_from([1e-6, 0.5, 1e6]),
    st.sampled_from(["", "8", "silu", "gelu", "default"]), st.just([]),
)  # fmt: skip
KEYS = [
    *BASE["llama"], "head_dim", "sliding_window", "layer_types", "hidden_act", "attention_bias", "mlp_bias",
    "partial_rotary_factor", "pretraining_tp", "attention_multiplier", "logits_scaling", "num_experts", "n_layer",
    "hidden_dim", "rms_eps", "head_size", "use_sliding_window", "max_window_layers", "rope_ratio",
]  # fmt: skip
CHANGES = st.dictionaries(st.sampled_from(KEYS), st.one_of(VALUES, st.just("DROP")), max_size=3)


@pytest.mark.parametrize("family", BASE)
@settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(changes=CHANGES, ropes=st.dictionaries(st.sampled_from(["rope_scaling", "rope_parameters"]), ROPES, max_size=2))
def test_read_as_transformers_does_or_refused(
    family: str, changes: dict[str, Any], ropes: dict[str, Any], tmp_path: Path
) -> None:
    config = {key: value for key, value in (BASE[family] | changes | ropes).items() if value != "DROP"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        check_reading(read_architecture(tmp_path))
    except InputError:
        return
    ours, judge = read_architecture(tmp_path), AutoConfig.from_pretrained(str(tmp_path))
    assert (ours.hidden_size, ours.num_layers, ours.num_heads, ours.num_kv_heads, ours.head_dim) == (
        judge.hidden_size,
        judge.num_hidden_layers,
        judge.num_attention_heads,
        judge.num_key_value_heads,
        getattr(judge, "head_dim", None) or judge.hidden_size // judge.num_attention_heads,
    )
    config = RotaryFrequencies(ours)
    kind = judge.rope_parameters["rope_type"]
    if kind != "default":
        judge.head_dim = ours.head_dim  # transformers' functions take no null
        expected, factor = ROPE_INIT_FUNCTIONS[kind](judge, device=torch.device("cpu"))
        assert torch.equal(config._frequencies[0], expected.float()) and config.attention_factors == [factor]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "ropes is ({'rope_type': 'default', 'rope_theta': 500000.0} of 8 columns,) as read here, ({'factor': 2.0",
        ),
        ({"tie_word_embeddings": None}, "transformers refuses it: "),
        ({"num_hidden_layers": 2.0}, "`num_hidden_layers` = 2.0 must be a whole number above 0"),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 6},
            "6 does not divide hidden_size = 64, and there is no head",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide num_attention_heads = 8"),
        ({"head_dim": 7}, "heads of 7 columns have no rotary halves"),
        ({"rope_theta": None}, "rope_theta = None must be a number above 0"),
        ({"layer_types": True}, "`layer_types` = True must be a list"),
        ({"rope_scaling": "linear"}, "`rope_scaling` = 'linear' must be an object"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "names code of the checkpoint's own, which is never run here"),
        ({"quantization_config": {"bits": 4}}, "says that the weights are quantised; take the unquantised checkpoint"),
    ],
)
def test_what_cannot_be_read_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE["llama"] | changes))
    with pytest.raises(InputError) as caught:
        check_reading(read_architecture(tmp_path))
    assert message in str(caught.value) and str(caught.value).startswith(str(tmp_path / "config.json"))
