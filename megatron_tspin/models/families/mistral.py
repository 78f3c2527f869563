"""Mistral: transformers' `models/mistral`."""

from dataclasses import replace

from megatron_tspin.models.architecture import Architecture, LayerFacts
from megatron_tspin.models.families import llama
from megatron_tspin.models.families.config_reader import ConfigReader
from megatron_tspin.models.families.family import read_decoder, read_sizes


def read(reader: ConfigReader) -> Architecture:
    """One window for all layers."""
    sizes = read_sizes(reader, silent_kv_heads=8)
    count, window = reader.whole("num_hidden_layers"), reader.whole("sliding_window", 4096)
    kind = "full_attention" if window is None else "sliding_attention"
    reader.per_layer("layer_types", count, (kind,), [kind] * count)
    return read_decoder(
        reader,
        "mistral",
        sizes,
        (LayerFacts(window),) * count,
    )


MISTRAL = replace(llama.LLAMA, model_type="mistral", read=read)
