"""Qwen2 and Qwen2.5, with biases on queries, keys and values: transformers' `models/qwen2`."""

from dataclasses import replace

from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families import llama
from megatron_tspin.models.families.config_reader import ConfigReader
from megatron_tspin.models.families.family import read_decoder, read_sizes
from megatron_tspin.models.families.windows import read_layers, read_optional_window


def read(reader: ConfigReader) -> Architecture:
    """Where a window is used, the first `max_window_layers` layers have none."""
    sizes = read_sizes(reader, silent_kv_heads=32)
    full = reader.count("max_window_layers", 28)
    return read_decoder(
        reader,
        "qwen2",
        sizes,
        read_layers(reader, read_optional_window(reader), lambda i: i >= full),
        qkv_bias=True,
    )


QWEN2 = replace(llama.LLAMA, model_type="qwen2", read=read)
