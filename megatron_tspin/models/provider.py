"""From an architecture and a layout to the policy of this rank."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tspin.config import ParallelSection, TrainingSection
from megatron_tspin.models.attention import CausalAttention, RMSNorm
from megatron_tspin.models.gated_activation import GatedSiLU
from megatron_tspin.models.hf_config import Architecture
from megatron_tspin.models.packed_attention import choose_backend
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.models.rotary import RotaryFrequencies
from megatron_tspin.platform import device

ModelProvider = Callable[..., PolicyModel]


@dataclass
class PolicyConfig(TransformerConfig):
    """megatron-core's config plus what our modules read."""

    sliding_window_keys: int | None = None
    """Keys that a query sees, itself included. megatron-core's `window_size` would make its softmax overwrite masks."""
    packed_attention: str = "segments"
    """Backend of `packed_attention.BACKENDS` for packed rows."""


def transformer_config(
    architecture: Architecture,
    parallel: ParallelSection,
    training: TrainingSection,
    attention_factor: float = 1.0,
) -> PolicyConfig:
    """The architecture and the layout in megatron-core's terms."""
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    return PolicyConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        softmax_scale=architecture.head_dim**-0.5 * attention_factor**2,
        sliding_window_keys=architecture.sliding_window,
        packed_attention=choose_backend(training.packed_attention, device()),
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_te_activation_func=True,  # in truth: take the activation that the layer spec names
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=training.bf16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        # Without it the two neighbours of a rank are one rank at PP 2, and what it sends them gets mixed up.
        overlap_p2p_comm=parallel.num_virtual_stages > 1,
        batch_p2p_comm=parallel.num_virtual_stages == 1,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=training.recompute_granularity,
        recompute_method="uniform" if training.recompute_granularity == "full" else None,
        recompute_num_layers=1 if training.recompute_granularity == "full" else None,
        # Gradients are sums over triplets, divided once by the triplets of the global batch (objective/forward.py).
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # weights always come from a checkpoint
    )


def make_model_provider(
    architecture: Architecture, parallel: ParallelSection, training: TrainingSection
) -> ModelProvider:
    """Returns Megatron's `model_provider(pre_process, post_process, vp_stage=None)` for this architecture."""
    rotary = RotaryFrequencies(architecture.folder, architecture.head_dim)
    config = transformer_config(architecture, parallel, training, rotary.attention_factor)

    def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> PolicyModel:
        policy = PolicyModel(
            architecture,
            rotary,
            config=config,
            transformer_layer_spec=_block_spec(config, vp_stage),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        _mark_shards(policy)
        return policy

    return model_provider


def _mark_shards(policy: PolicyModel) -> None:
    """Tells which parameters TP splits; megatron-core 0.16 does it only while it initialises them, 0.19 always.

    Without the mark they count as replicas, and the gradient norm leaves out all TP ranks but the first.
    """
    split_dimension = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in policy.modules():
        dimension = split_dimension.get(type(module))
        if dimension is None or module.weight is None:
            continue
        if not hasattr(module.weight, "tensor_model_parallel"):  # to mark twice is refused
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dimension, stride=1)


def _block_spec(config: PolicyConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """megatron-core's local layer with our attention and norm, as many times as this stage has layers."""
    layer: ModuleSpec = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm"))
    parts: Any = layer.submodules
    parts.input_layernorm = RMSNorm
    parts.pre_mlp_layernorm = RMSNorm
    _submodules(parts.self_attention).core_attention = CausalAttention
    _submodules(parts.mlp).activation_func = GatedSiLU
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)


def _submodules(part: Any) -> Any:
    """What a part of a layer is built from; megatron-core describes it by a ModuleSpec, 0.19 the MLP by a partial."""
    return part.keywords["submodules"] if isinstance(part, functools.partial) else part.submodules
