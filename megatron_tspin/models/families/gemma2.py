"""Gemma 2, with four norms a layer and soft caps: transformers' `models/gemma2`."""

from dataclasses import replace

from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families import llama, table
from megatron_tspin.models.families.config_reader import ConfigReader
from megatron_tspin.models.families.family import read_rms_norm, read_sizes
from megatron_tspin.models.families.rope_settings import read_rope
from megatron_tspin.models.families.table import Line
from megatron_tspin.models.families.windows import read_layers


def read(reader: ConfigReader) -> Architecture:
    """Every second layer sees all, from the second on."""
    return read_gemma(
        reader,
        family="gemma2",
        every=2,
        attention_cap=reader.number("attn_logit_softcapping", 50.0),
        logits_cap=reader.number("final_logit_softcapping", 30.0),
    )


def read_gemma(reader: ConfigReader, family: str, every: int, **differences: object) -> Architecture:
    """What Gemma 2 and 3 share.

    Args:
        reader: Of the config.
        family: `Architecture.family`.
        every: One layer of so many sees all, where the config has no `layer_types`.
        differences: Other facts of the architecture.
    """
    sizes = read_sizes(reader, silent_kv_heads=4, silent_head_dim=256, silently_tied=True)
    reader.only("use_bidirectional_attention", False)
    bias = reader.flag("attention_bias")
    if "ropes" not in differences:
        differences["ropes"] = (read_rope(reader, sizes["head_dim"], sizes["max_positions"]),)
    facts = {
        "layers": read_layers(reader, reader.whole("sliding_window", 4096), lambda i: (i + 1) % every != 0),
        "norm": read_rms_norm(reader, unit_offset=True),
        "softmax_scale": reader.number("query_pre_attn_scalar", 256) ** -0.5,
        "activation": reader.activation("hidden_activation", "gelu_pytorch_tanh"),
        "embedding_scale": sizes["hidden_size"] ** 0.5,
        **differences,
    }
    return Architecture(family=family, **sizes, **facts, qkv_bias=bias, output_bias=bias, norm_after=True)


_HF, _CORE = "model.layers.{layer}.", "decoder.layers.{layer}."
NORMS = (
    Line(_CORE + "post_self_attn_layernorm", (_HF + "post_attention_layernorm",), table.hidden),
    Line(_CORE + "pre_mlp_layernorm", (_HF + "pre_feedforward_layernorm",), table.hidden),
    Line(_CORE + "post_mlp_layernorm", (_HF + "post_feedforward_layernorm",), table.hidden),
)
GEMMA2 = replace(
    llama.LLAMA,
    model_type="gemma2",
    read=read,
    layer=(llama.BEFORE_ATTENTION, llama.QKV, llama.OUTPUT, *NORMS, *llama.MLP),
    neutral={
        "hidden_act": "transformers reads `hidden_activation` instead",
        "cache_implementation": "how transformers caches keys and values",
    },
)
