"""Qwen3, whose heads are normalised before they are rotated: transformers' `models/qwen3`."""

from dataclasses import replace

from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families import llama
from megatron_tspin.models.families.config_reader import ConfigReader
from megatron_tspin.models.families.family import read_decoder, read_sizes
from megatron_tspin.models.families.windows import read_layers, read_optional_window


def read(reader: ConfigReader) -> Architecture:
    """Where a window is used, the first `max_window_layers` layers have none."""
    sizes = read_sizes(reader, silent_kv_heads=32, silent_head_dim=128)
    full, bias = reader.count("max_window_layers", 28), reader.flag("attention_bias")
    return read_decoder(
        reader,
        "qwen3",
        sizes,
        read_layers(reader, read_optional_window(reader), lambda i: i >= full),
        qkv_bias=bias,
        output_bias=bias,
        query_key_norm="head",
    )


ATTENTION = (llama.BEFORE_ATTENTION, llama.QKV, *llama.HEAD_NORMS, llama.OUTPUT, llama.BEFORE_MLP)
QWEN3 = replace(llama.LLAMA, model_type="qwen3", read=read, layer=(*ATTENTION, *llama.MLP))
