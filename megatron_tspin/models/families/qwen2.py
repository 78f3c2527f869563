"""Qwen2 and Qwen2.5, with biases on queries, keys and values: transformers' `models/qwen2`."""

from dataclasses import replace

from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families import llama
from megatron_tspin.models.families.config_reader import ConfigReader
from megatron_tspin.models.families.family import read_rms_norm, read_sizes
from megatron_tspin.models.families.rope_settings import read_rope
from megatron_tspin.models.families.windows import read_layers, read_optional_window


def read(reader: ConfigReader) -> Architecture:
    """Where a window is used, the first `max_window_layers` layers have none."""
    sizes = read_sizes(reader, silent_kv_heads=32)
    full = reader.raw("max_window_layers", 28)
    return Architecture(
        family="qwen2",
        **sizes,
        layers=read_layers(reader, read_optional_window(reader), lambda i: i >= full),
        norm=read_rms_norm(reader),
        ropes=(read_rope(reader, sizes["head_dim"], sizes["max_positions"]),),
        softmax_scale=sizes["head_dim"] ** -0.5,
        activation=reader.activation("hidden_act", "silu"),
        qkv_bias=True,
    )


QWEN2 = replace(llama.LLAMA, model_type="qwen2", read=read)
