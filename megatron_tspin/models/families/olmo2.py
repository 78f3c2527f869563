"""OLMo 2, whose norms come after attention and MLP: transformers' `models/olmo2`."""

from dataclasses import replace

from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families import llama, table
from megatron_tspin.models.families.config_reader import ConfigReader
from megatron_tspin.models.families.gemma2 import NORMS
from megatron_tspin.models.families.table import Line


def read(reader: ConfigReader) -> Architecture:
    """All queries are normalised as one vector, and so are all keys."""
    return replace(llama.read(reader), family="olmo2", query_key_norm="all", norm_before=False, norm_after=True)


_HF, _CORE = "model.layers.{layer}.self_attn.", "decoder.layers.{layer}.self_attention."
_AFTER_ATTENTION, _, _AFTER_MLP = NORMS
OLMO2 = replace(
    llama.LLAMA,
    model_type="olmo2",
    read=read,
    layer=(
        llama.QKV,
        Line(_CORE + "q_layernorm", (_HF + "q_norm",), table.all_queries),
        Line(_CORE + "k_layernorm", (_HF + "k_norm",), table.all_keys),
        llama.OUTPUT,
        _AFTER_ATTENTION,
        *llama.MLP,
        _AFTER_MLP,
    ),
)
