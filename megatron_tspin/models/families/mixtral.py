"""Mixtral, a mixture of experts in every layer: transformers' `models/mixtral`."""

from dataclasses import replace

from megatron_tspin.models.architecture import Architecture, Experts, LayerFacts
from megatron_tspin.models.families import llama, table
from megatron_tspin.models.families.config_reader import ConfigReader
from megatron_tspin.models.families.family import read_decoder, read_sizes
from megatron_tspin.models.families.rope_settings import read_rope
from megatron_tspin.models.families.table import Line

ROUTER_LOSS = {
    "router_aux_loss_coef": "weighs a loss of transformers' own that T-SPIN's loss has no part of",
    "output_router_logits": "asks transformers for that loss",
}


def read(reader: ConfigReader) -> Architecture:
    """The chosen experts' probabilities sum to 1."""
    sizes = read_sizes(reader, silent_kv_heads=8)
    count, window = reader.whole("num_hidden_layers"), reader.whole("sliding_window", None)
    return read_decoder(
        reader,
        "mixtral",
        sizes,
        (LayerFacts(window, sparse=True),) * count,
        rope=read_rope(reader, sizes["head_dim"], sizes["max_positions"], default_theta=1000000.0),
        experts=Experts(
            count=reader.whole("num_local_experts", 8),
            per_token=reader.whole("num_experts_per_tok", 2),
            ffn_hidden_size=sizes["ffn_hidden_size"],
            normalised=True,
        ),
    )


_HF, _CORE = "model.layers.{layer}.block_sparse_moe.", "decoder.layers.{layer}.mlp."
_HF_EXPERT, _EXPERT = _HF + "experts.{expert}.", _CORE + "experts.local_experts.{expert}."
MIXTRAL = replace(
    llama.LLAMA,
    model_type="mixtral",
    read=read,
    layer=(
        llama.BEFORE_ATTENTION,
        llama.QKV,
        llama.OUTPUT,
        llama.BEFORE_MLP,
        Line(_CORE + "router", (_HF + "gate",), table.router),
        Line(_EXPERT + "linear_fc1", (_HF_EXPERT + "w1", _HF_EXPERT + "w3"), table.expert_gate_up),
        Line(_EXPERT + "linear_fc2", (_HF_EXPERT + "w2",), table.expert_down),
    ),
    neutral=ROUTER_LOSS | {"router_jitter_noise": "noise of transformers' own training"},
)
