"""What a decoder layer is built of: torch's linears, our FP8 ones, or Transformer Engine's. Attention is ours."""

import copy
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.models.attention import CausalAttention, RMSNorm
from megatron_tspin.models.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_tspin.models.gated_activation import GatedSiLU
from megatron_tspin.precision import in_fp8, uses_transformer_engine


def block_spec(
    precision: PrecisionSection, first_layer: int, count: int, num_layers: int
) -> TransformerBlockSubmodules:
    """The layers of a pipeline stage, from `first_layer` (from 0, through the whole network) on, and the last norm."""
    if uses_transformer_engine(precision):
        # Which of these compute in FP8 megatron-core decides, layer by layer, from its config.
        return TransformerBlockSubmodules(layer_specs=[te_layer()] * count, layer_norm=_te_norm())
    kinds = [in_fp8(precision, first_layer + i, num_layers) for i in range(count)]
    layer_of = {kind: local_layer(fp8=kind) for kind in set(kinds)}
    layers = [layer_of[kind] for kind in kinds]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def local_layer(fp8: bool) -> ModuleSpec:
    """megatron-core's own layer with our attention, norm and activation, and on request our FP8 linears."""
    layer, parts, mlp = _with_our_attention(get_gpt_layer_local_spec(normalization="RMSNorm"))
    parts.input_layernorm = RMSNorm
    parts.pre_mlp_layernorm = RMSNorm
    if fp8:
        attention = parts.self_attention.submodules
        attention.linear_qkv, attention.linear_proj = Fp8ColumnParallelLinear, Fp8RowParallelLinear
        mlp.linear_fc1, mlp.linear_fc2 = Fp8ColumnParallelLinear, Fp8RowParallelLinear
    return layer


def te_layer() -> ModuleSpec:
    """megatron-core's layer of Transformer Engine's linears with the norms fused in, with our attention."""
    layer, _, _ = _with_our_attention(get_gpt_layer_with_transformer_engine_spec())
    return layer


def _te_norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm  # a stub where Transformer Engine is missing

    return TENorm


def _with_our_attention(spec: ModuleSpec) -> tuple[ModuleSpec, Any, Any]:
    """A copy with our attention and activation; also its parts, and those of its MLP."""
    layer = copy.deepcopy(spec)
    parts: Any = layer.submodules
    # A spec as well in megatron-core 0.16, a partial in 0.19.
    mlp: Any = parts.mlp.keywords["submodules"] if isinstance(parts.mlp, partial) else parts.mlp.submodules
    parts.self_attention.submodules.core_attention = CausalAttention
    mlp.activation_func = GatedSiLU
    return layer, parts, mlp
