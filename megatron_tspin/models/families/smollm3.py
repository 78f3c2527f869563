"""SmolLM3, where some layers know no positions: transformers' `models/smollm3`."""

from dataclasses import replace

from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families import llama
from megatron_tspin.models.families.config_reader import ConfigReader
from megatron_tspin.models.families.family import read_decoder, read_sizes
from megatron_tspin.models.families.rope_settings import read_rope
from megatron_tspin.models.families.windows import read_layers


def read(reader: ConfigReader) -> Architecture:
    """Every fourth layer rotates nothing, unless the config lists others."""
    sizes = read_sizes(reader, silent_kv_heads=4, silently_tied=True)
    count, interval = reader.whole("num_hidden_layers"), reader.whole("no_rope_layer_interval", 4)
    rotated = reader.listing("no_rope_layers")  # 1 where a layer does rotate, whatever the key's name says
    if rotated is None:
        rotated = [int((i + 1) % interval != 0) for i in range(count)]
    if len(rotated) != count or any(flag not in (0, 1) for flag in rotated):
        reader.refuse(f"no_rope_layers = {rotated} must be a 0 or a 1 for each of the {count} layers")
        rotated = [1] * count
    used, window = reader.flag("use_sliding_window"), reader.whole("sliding_window", None)
    layers = read_layers(reader, window if used else None, lambda i: not rotated[i])
    bias = reader.flag("attention_bias")
    return read_decoder(
        reader,
        "smollm3",
        sizes,
        tuple(replace(facts, rope=0 if on else None) for facts, on in zip(layers, rotated, strict=True)),
        rope=read_rope(reader, sizes["head_dim"], sizes["max_positions"], default_theta=2000000.0),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=reader.flag("mlp_bias"),
    )


_NEUTRAL = {"max_window_layers": "transformers reads it nowhere; `layer_types` says which layers slide"}
SMOLLM3 = replace(llama.LLAMA, model_type="smollm3", read=read, neutral=_NEUTRAL)
