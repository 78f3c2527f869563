"""What a decoder layer is built of: torch's linears, our FP8 ones, or Transformer Engine's. Attention is ours."""

import copy
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.models.activations import activation_class
from megatron_tspin.models.architecture import Architecture, Experts, LayerFacts
from megatron_tspin.models.attention import CausalAttention
from megatron_tspin.models.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_tspin.models.linears import ColumnLinear, RowLinear
from megatron_tspin.models.norms import AllHeadsRMSNorm, LayerNorm, RMSNorm
from megatron_tspin.models.policy_layer import LayerPlan, PolicyLayer
from megatron_tspin.models.scores import Scores
from megatron_tspin.precision import in_fp8, uses_transformer_engine


def block_spec(
    architecture: Architecture,
    precision: PrecisionSection,
    first_layer: int,
    count: int,
) -> TransformerBlockSubmodules:
    """The layers of a pipeline stage, and the last norm.

    Args:
        architecture: Of the whole network.
        precision: Number formats.
        first_layer: The stage's first layer, from 0, through the whole network.
        count: Its layers.
    """
    made: dict[Any, ModuleSpec] = {}
    specs = []
    for layer in range(first_layer, first_layer + count):
        facts, fp8 = architecture.layers[layer], in_fp8(precision, layer, architecture.num_layers)
        key = (facts, fp8)
        if key not in made:
            made[key] = _layer(architecture, facts, precision, fp8)
        specs.append(made[key])
    norm = _te_norm() if uses_transformer_engine(precision) else norm_class(architecture)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def _layer(architecture: Architecture, facts: LayerFacts, precision: PrecisionSection, fp8: bool) -> ModuleSpec:
    """One layer. Which of Transformer Engine's parts compute in FP8 megatron-core decides, layer by layer."""
    engine = uses_transformer_engine(precision)
    layer, parts, mlp = _megatron_layer(engine, architecture.experts if facts.sparse else None)
    attention = parts.self_attention.submodules
    if not engine:
        norm = norm_class(architecture) if architecture.norm_before else IdentityOp
        parts.input_layernorm = parts.pre_mlp_layernorm = norm
        column, row = (Fp8ColumnParallelLinear, Fp8RowParallelLinear) if fp8 else (ColumnLinear, RowLinear)
        attention.linear_qkv, attention.linear_proj = column, row
        mlp.linear_fc1, mlp.linear_fc2 = column, row
    elif not architecture.norm_before:
        attention.linear_qkv = mlp.linear_fc1 = _te_column_linear()
    bias = architecture.mlp_bias and not facts.sparse
    attention.linear_qkv = configured(attention.linear_qkv, bias=architecture.qkv_bias)
    attention.linear_proj = configured(attention.linear_proj, bias=architecture.output_bias)
    mlp.linear_fc1 = configured(mlp.linear_fc1, bias=bias)
    mlp.linear_fc2 = configured(mlp.linear_fc2, bias=bias)
    mlp.activation_func = activation_class(architecture.activation, architecture.gated)
    scores = Scores(architecture.softmax_scale, facts.window, architecture.attention_cap)
    attention.core_attention = configured(CausalAttention, scores=scores)
    attention.q_layernorm, attention.k_layernorm = _query_key_norms(architecture)
    after = norm_class(architecture) if architecture.norm_after else None
    plan = LayerPlan(facts.rope, after, architecture.residual_scale, architecture.parallel_residual)
    layer.module = configured(PolicyLayer, plan=plan)
    return layer


def _query_key_norms(architecture: Architecture) -> tuple[type, type]:
    """What queries and keys go through before they are rotated."""
    if architecture.query_key_norm == "all":
        heads = (architecture.num_heads, architecture.num_kv_heads)
        queries, keys = (configured(AllHeadsRMSNorm, heads=count) for count in heads)
        return queries, keys
    norm = norm_class(architecture) if architecture.query_key_norm == "head" else IdentityOp
    return norm, norm


def norm_class(architecture: Architecture) -> type:
    """Our norm of hidden states."""
    if architecture.norm.kind == "layer":
        return LayerNorm
    return configured(RMSNorm, unit_offset=True) if architecture.norm.unit_offset else RMSNorm


def configured(base: Any, **given: Any) -> Any:
    """The class with some arguments of its constructor given, whatever it is called with.

    megatron-core 0.16 builds parts from classes and specs, 0.19 from classes and functions: a class is what both take.
    It has one switch for the biases of all linears, where families differ linear by linear.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **{**kwargs, **given})

    return type(base)(base.__name__, (base,), {"__init__": __init__, "__doc__": base.__doc__})


def _te_norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm  # a stub where Transformer Engine is missing

    return TENorm


def _te_column_linear() -> Any:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    return TEColumnParallelLinear


def _megatron_layer(engine: bool, experts: Experts | None) -> tuple[ModuleSpec, Any, Any]:
    """A copy of megatron-core's layer; also its parts, and those of its MLP or of each expert."""
    count = None if experts is None else experts.count
    if not hasattr(moe_utils, "te_general_gemm"):  # megatron-core 0.16 asks for it without Transformer Engine too
        vars(moe_utils)["te_general_gemm"] = None
    if engine:
        spec = get_gpt_layer_with_transformer_engine_spec(num_experts=count)
    else:
        spec = get_gpt_layer_local_spec(num_experts=count, normalization="RMSNorm")
    layer = copy.deepcopy(spec)
    parts: Any = layer.submodules
    mlp = _submodules(parts.mlp)
    return layer, parts, mlp if experts is None else _submodules(mlp.experts)


def _submodules(part: Any) -> Any:
    """Of what is a spec in megatron-core 0.16, and a partial in 0.19."""
    return part.keywords["submodules"] if isinstance(part, partial) else part.submodules
