"""From an architecture and a layout to the policy of this rank."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_tspin.config import ParallelSection, TrainingSection
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.layer_specs import block_spec
from megatron_tspin.models.packed_attention import choose_backend
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.models.rotary import RotaryFrequencies
from megatron_tspin.platform import device
from megatron_tspin.precision import TorchFp8, core_fields, torch_fp8, uses_transformer_engine

ModelProvider = Callable[..., PolicyModel]


@dataclass
class PolicyConfig(TransformerConfig):
    """megatron-core's config plus what our modules read."""

    packed_attention: str = "segments"
    """Backend of `packed_attention.BACKENDS` for packed rows."""
    torch_fp8: TorchFp8 | None = None
    """Of our own FP8 linears."""


def transformer_config(
    architecture: Architecture,
    parallel: ParallelSection,
    training: TrainingSection,
    precision: PrecisionSection,
) -> PolicyConfig:
    """The architecture, the layout and the number formats in megatron-core's terms."""
    return PolicyConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        packed_attention=choose_backend(
            training.packed_attention, device(), uses_transformer_engine(precision), training.share_prompts
        ),
        # For Transformer Engine's norms, which take these from the config; ours are told by the layer specs, as are
        # attention (scale, window, cap) and biases.
        normalization="LayerNorm" if architecture.norm.kind == "layer" else "RMSNorm",
        layernorm_zero_centered_gamma=architecture.norm.unit_offset,
        layernorm_epsilon=architecture.norm.eps,
        # Gradients of each head's norm are summed over TP. Norms over all heads are split instead.
        qk_layernorm=architecture.query_key_norm == "head",
        gated_linear_unit=architecture.gated,
        activation_func=torch.nn.functional.silu,
        use_te_activation_func=True,  # in truth: take the activation that the layer spec names
        add_bias_linear=False,
        **_expert_fields(architecture, parallel),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        torch_fp8=torch_fp8(precision),
        **core_fields(precision),
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


def _expert_fields(architecture: Architecture, parallel: ParallelSection) -> dict[str, Any]:
    """megatron-core's settings of a mixture of experts, with no loss of the router's own."""
    experts = architecture.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.tensor_model_parallel_size,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.per_token,
        # Probabilities over all experts and then the largest of them, or over the largest logits: they sum to 1.
        "moe_router_pre_softmax": not experts.normalised,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        # gloo exchanges no unequal parts.
        "moe_token_dispatcher_type": "alltoall" if torch.cuda.is_available() else "allgather",
    }


def make_model_provider(
    architecture: Architecture, parallel: ParallelSection, training: TrainingSection, precision: PrecisionSection
) -> ModelProvider:
    """Returns Megatron's `model_provider(pre_process, post_process, vp_stage=None)` for this architecture."""
    rotary = RotaryFrequencies(architecture)
    config = transformer_config(architecture, parallel, training, precision)

    def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> PolicyModel:
        layers = get_num_layers_to_build(config, vp_stage=vp_stage)
        first = get_transformer_layer_offset(config, vp_stage=vp_stage)
        policy = PolicyModel(
            architecture,
            rotary,
            config=config,
            transformer_layer_spec=block_spec(architecture, precision, first, layers),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        _mark_shards(policy)
        _sum_gradients_in_fp32(policy)
        return policy

    return model_provider


def _mark_shards(policy: PolicyModel) -> None:
    """Tells which parameters TP splits; megatron-core 0.16 does it only while it initialises them, 0.19 always.

    Without the mark they count as replicas, and the gradient norm leaves out all TP ranks but the first.
    """
    split_dimension = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in policy.modules():
        dimension = next((split for kind, split in split_dimension.items() if isinstance(module, kind)), None)
        if dimension is None or module.weight is None:
            continue
        if not hasattr(module.weight, "tensor_model_parallel"):  # to mark twice is refused
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dimension, stride=1)


def _sum_gradients_in_fp32(policy: PolicyModel) -> None:
    """Lets Transformer Engine's linears add their weight gradients to megatron-core's fp32 buffer themselves.

    Otherwise each micro-batch's gradient is rounded to bf16 first. megatron-core's own switch for it
    (`gradient_accumulation_fusion`) would ask for apex in the other linears.
    """
    for module in policy.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
