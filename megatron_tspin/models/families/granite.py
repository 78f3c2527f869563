"""Granite, a Llama with four multipliers: transformers' `models/granite`."""

from dataclasses import replace

from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families import llama
from megatron_tspin.models.families.config_reader import ConfigReader


def read(reader: ConfigReader) -> Architecture:
    """Scores, embeddings, outputs and logits are scaled by the config."""
    return replace(
        llama.read(reader),
        family="granite",
        softmax_scale=reader.number("attention_multiplier", 1.0),
        embedding_scale=reader.number("embedding_multiplier", 1.0),
        residual_scale=reader.number("residual_multiplier", 1.0),
        logits_scale=1.0 / (reader.number("logits_scaling", 1.0) or 1.0),
    )


GRANITE = replace(llama.LLAMA, model_type="granite", read=read)
