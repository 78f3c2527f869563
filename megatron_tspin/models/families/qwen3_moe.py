"""Qwen3-MoE: transformers' `models/qwen3_moe`."""

from dataclasses import replace

from megatron_tspin.models.architecture import Architecture, Experts, LayerFacts
from megatron_tspin.models.families import llama, qwen3, table
from megatron_tspin.models.families.config_reader import ConfigReader
from megatron_tspin.models.families.family import read_decoder, read_sizes
from megatron_tspin.models.families.mixtral import ROUTER_LOSS
from megatron_tspin.models.families.table import Line
from megatron_tspin.models.families.windows import read_optional_window


def read(reader: ConfigReader) -> Architecture:
    """Layers that `mlp_only_layers` lists, or that `decoder_sparse_step` passes over, have a dense MLP."""
    sizes = read_sizes(reader, silent_kv_heads=4)
    window, bias = read_optional_window(reader), reader.flag("attention_bias")
    experts = Experts(
        count=reader.whole("num_local_experts", None) or reader.whole("num_experts", 128),
        per_token=reader.whole("num_experts_per_tok", 8),
        ffn_hidden_size=reader.whole("moe_intermediate_size", 768),
        normalised=reader.flag("norm_topk_prob"),
    )
    step, dense = reader.whole("decoder_sparse_step", 1), reader.listing("mlp_only_layers") or []
    layers = (
        LayerFacts(window, sparse=layer not in dense and (layer + 1) % step == 0)
        for layer in range(reader.whole("num_hidden_layers"))
    )
    return read_decoder(
        reader,
        "qwen3_moe",
        sizes,
        layers,
        qkv_bias=bias,
        output_bias=bias,
        query_key_norm="head",
        experts=experts,
    )


_HF, _CORE = "model.layers.{layer}.mlp.", "decoder.layers.{layer}.mlp."
_HF_EXPERT, _EXPERT = _HF + "experts.{expert}.", _CORE + "experts.local_experts.{expert}."
QWEN3_MOE = replace(
    llama.LLAMA,
    model_type="qwen3_moe",
    read=read,
    layer=(
        *qwen3.ATTENTION,
        *llama.MLP,
        Line(_CORE + "router", (_HF + "gate",), table.router, sparse=True),
        Line(
            _EXPERT + "linear_fc1",
            (_HF_EXPERT + "gate_proj", _HF_EXPERT + "up_proj"),
            table.expert_gate_up,
            sparse=True,
        ),
        Line(_EXPERT + "linear_fc2", (_HF_EXPERT + "down_proj",), table.expert_down, sparse=True),
    ),
    neutral=ROUTER_LOSS | {"max_window_layers": "transformers reads it nowhere; every layer has the window"},
)
