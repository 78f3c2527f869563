"""GPT-NeoX and Pythia: LayerNorm, biases everywhere, a parallel residual. Transformers' `models/gpt_neox`."""

from megatron_tspin.models.architecture import Architecture, LayerFacts, Norm
from megatron_tspin.models.families import table
from megatron_tspin.models.families.config_reader import ConfigReader
from megatron_tspin.models.families.family import Family, read_sizes
from megatron_tspin.models.families.rope_settings import read_rope
from megatron_tspin.models.families.table import EMBEDDING, OUTPUT_LAYER, Line


def read(reader: ConfigReader) -> Architecture:
    """A quarter of each head is rotated, unless the config has another share."""
    sizes = read_sizes(reader)
    reader.only("head_dim", sizes["hidden_size"] // sizes["num_heads"])
    reader.only("num_key_value_heads", sizes["num_heads"])
    bias = reader.flag("attention_bias", True)
    return Architecture(
        family="gpt_neox",
        **sizes,
        layers=(LayerFacts(),) * reader.whole("num_hidden_layers"),
        norm=Norm("layer", reader.number("layer_norm_eps", 1e-5)),
        ropes=(
            read_rope(
                reader,
                sizes["head_dim"],
                sizes["max_positions"],
                default_partial=0.25,
                keys=("rotary_emb_base", "rotary_pct"),
            ),
        ),
        softmax_scale=sizes["head_dim"] ** -0.5,
        activation=reader.activation("hidden_act", "gelu"),
        gated=False,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        parallel_residual=reader.flag("use_parallel_residual", True),
    )


_HF, _CORE = "gpt_neox.layers.{layer}.", "decoder.layers.{layer}."
GPT_NEOX = Family(
    "gpt_neox",
    read,
    first=(Line(EMBEDDING, ("gpt_neox.embed_in",), table.vocabulary),),
    layer=(
        Line(_CORE + "input_layernorm", (_HF + "input_layernorm",), table.hidden, "norm_bias"),
        Line(
            _CORE + "self_attention.linear_qkv",
            (_HF + "attention.query_key_value",),
            table.interleaved_qkv,
            "qkv_bias",
        ),
        Line(_CORE + "self_attention.linear_proj", (_HF + "attention.dense",), table.attention_output, "output_bias"),
        Line(_CORE + "pre_mlp_layernorm", (_HF + "post_attention_layernorm",), table.hidden, "norm_bias"),
        Line(_CORE + "mlp.linear_fc1", (_HF + "mlp.dense_h_to_4h",), table.up, "mlp_bias"),
        Line(_CORE + "mlp.linear_fc2", (_HF + "mlp.dense_4h_to_h",), table.down, "mlp_bias"),
    ),
    last=(
        Line("decoder.final_layernorm", ("gpt_neox.final_layer_norm",), table.hidden, "norm_bias"),
        Line(OUTPUT_LAYER, ("embed_out",), table.vocabulary),
    ),
    buffers=(".attention.bias", ".attention.masked_bias"),
)
