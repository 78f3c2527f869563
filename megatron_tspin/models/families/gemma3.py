"""Gemma 3, text: two ropes, and heads that are normalised. Transformers' `models/gemma3`, `gemma3_text`."""

from dataclasses import replace

from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families import llama
from megatron_tspin.models.families.config_reader import ConfigReader
from megatron_tspin.models.families.gemma2 import GEMMA2, NORMS, read_gemma
from megatron_tspin.models.families.rope_settings import read_ropes_by_layer_type
from megatron_tspin.models.families.windows import FULL, SLIDING


def read(reader: ConfigReader) -> Architecture:
    """One layer of six sees all and has the rope of `full_attention`; the others have that of `sliding_attention`."""
    head_dim, positions = reader.whole("head_dim", 256) or 1, reader.whole("max_position_embeddings")
    pattern = reader.whole("sliding_window_pattern", None) or reader.whole("_sliding_window_pattern", 6)
    found = read_gemma(
        reader,
        family="gemma3_text",
        every=pattern,
        attention_cap=reader.number("attn_logit_softcapping", None),
        logits_cap=reader.number("final_logit_softcapping", None),
        query_key_norm="head",
        ropes=read_ropes_by_layer_type(
            reader, head_dim, positions, {FULL: ("rope_theta", 1000000.0), SLIDING: ("rope_local_base_freq", 10000.0)}
        ),
    )
    layers = (replace(facts, rope=0 if facts.window is None else 1) for facts in found.layers)
    return replace(found, layers=tuple(layers))


GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    read=read,
    layer=(llama.BEFORE_ATTENTION, llama.QKV, *llama.HEAD_NORMS, llama.OUTPUT, *NORMS, *llama.MLP),
)
