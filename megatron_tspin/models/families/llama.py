"""Llama 2 and 3, SmolLM2, and what other families build on: transformers' `models/llama`."""

from dataclasses import replace

from megatron_tspin.models.architecture import Architecture, LayerFacts
from megatron_tspin.models.families import table
from megatron_tspin.models.families.config_reader import ConfigReader
from megatron_tspin.models.families.family import Family, read_decoder, read_sizes
from megatron_tspin.models.families.table import EMBEDDING, OUTPUT_LAYER, Line

_HF, _CORE = "model.layers.{layer}.", "decoder.layers.{layer}."


def read(reader: ConfigReader) -> Architecture:
    """Layers are alike."""
    sizes = read_sizes(reader)
    reader.raw("sliding_window")  # transformers' Llama has no window, whatever the file says
    count = reader.whole("num_hidden_layers")
    reader.per_layer("layer_types", count, ("full_attention",), ["full_attention"] * count)
    bias = reader.flag("attention_bias")
    return read_decoder(
        reader,
        "llama",
        sizes,
        (LayerFacts(),) * count,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=reader.flag("mlp_bias"),
    )


FIRST = (Line(EMBEDDING, ("model.embed_tokens",), table.vocabulary),)
LAST = (
    Line("decoder.final_layernorm", ("model.norm",), table.hidden),
    Line(OUTPUT_LAYER, ("lm_head",), table.vocabulary),
)
BEFORE_ATTENTION = Line(_CORE + "input_layernorm", (_HF + "input_layernorm",), table.hidden)
QKV = Line(
    _CORE + "self_attention.linear_qkv", tuple(_HF + f"self_attn.{part}_proj" for part in "qkv"), table.qkv, "qkv_bias"
)
HEAD_NORMS = tuple(
    Line(_CORE + f"self_attention.{part}_layernorm", (_HF + f"self_attn.{part}_norm",), table.head) for part in "qk"
)
OUTPUT = Line(_CORE + "self_attention.linear_proj", (_HF + "self_attn.o_proj",), table.attention_output, "output_bias")
BEFORE_MLP = Line(_CORE + "pre_mlp_layernorm", (_HF + "post_attention_layernorm",), table.hidden)
MLP = (
    Line(_CORE + "mlp.linear_fc1", (_HF + "mlp.gate_proj", _HF + "mlp.up_proj"), table.gate_up, "mlp_bias", False),
    Line(_CORE + "mlp.linear_fc2", (_HF + "mlp.down_proj",), table.down, "mlp_bias", False),
)
LLAMA = Family("llama", read, FIRST, (BEFORE_ATTENTION, QKV, OUTPUT, BEFORE_MLP, *MLP), LAST)


def renamed(line: Line, old: str, new: str) -> Line:
    """The line with other HF names."""
    return replace(line, hf=tuple(name.replace(old, new) for name in line.hf))
