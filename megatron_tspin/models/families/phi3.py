"""Phi-3 and Phi-4, of fused tensors: transformers' `models/phi3`."""

from dataclasses import replace

from megatron_tspin.models.architecture import Architecture, LayerFacts
from megatron_tspin.models.families import llama, table
from megatron_tspin.models.families.config_reader import ConfigReader
from megatron_tspin.models.families.family import read_decoder, read_sizes
from megatron_tspin.models.families.rope_settings import read_rope

_OLD_TYPES = {"su": "longrope", "yarn": "longrope"}


def read(reader: ConfigReader) -> Architecture:
    """Longrope has other frequencies beyond the original positions; those are not implemented."""
    sizes = read_sizes(reader)
    count, window = reader.whole("num_hidden_layers"), reader.whole("sliding_window", None)
    original = reader.whole("original_max_position_embeddings", 4096)
    rope = read_rope(reader, sizes["head_dim"], original, default_partial=1.0, old_types=_OLD_TYPES)
    if rope.settings["rope_type"] == "longrope":
        rope = replace(rope, settings={**rope.settings, "original_max_position_embeddings": original})
        sizes["max_positions"] = min(sizes["max_positions"], original)
    return read_decoder(
        reader,
        "phi3",
        sizes,
        (LayerFacts(window),) * count,
        rope=rope,
    )


_QKV = replace(llama.QKV, hf=("model.layers.{layer}.self_attn.qkv_proj",), layout=table.fused_qkv)
_GATE_UP, _DOWN = llama.MLP
_FUSED = replace(_GATE_UP, hf=("model.layers.{layer}.mlp.gate_up_proj",), layout=table.fused_gate_up)
PHI3 = replace(
    llama.LLAMA,
    model_type="phi3",
    read=read,
    layer=(llama.BEFORE_ATTENTION, _QKV, llama.OUTPUT, llama.BEFORE_MLP, _FUSED, _DOWN),
    neutral=dict.fromkeys(("full_attn_mod", "interpolate_factor"), "transformers' own class reads it nowhere"),
)
