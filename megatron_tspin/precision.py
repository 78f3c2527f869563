"""What the settings of number formats mean: for megatron-core and Transformer Engine, and for our own FP8 layers.

`config_precision.PrecisionSection` says what is wanted and refuses what no machine can do; here is what that takes.
Whatever the format, master weights, gradient sums, the head's log-sum-exp, log-probs and the loss are fp32.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.errors import InputError
from megatron_tspin.platform import has_cuda

_FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
_MXFP8_CAPABILITY = (10, 0)  # Blackwell
_BLOCKWISE_CUDA = (12, 9)  # Transformer Engine's need


@dataclass(frozen=True)
class TorchFp8:
    """Settings of the torch-native FP8 linears.

    Attributes:
        forward: Type of activations and weights.
        backward: Type of output gradients.
        rowwise: A scale for each row of the left and each column of the right operand; else one a tensor.
        margin: Scales leave 2**margin of headroom.
    """

    forward: torch.dtype
    backward: torch.dtype
    rowwise: bool
    margin: int = 0


def compute_dtype(precision: PrecisionSection) -> torch.dtype:
    """Type of parameters and activations outside FP8 layers."""
    return torch.bfloat16 if precision.bf16 else torch.float32


def uses_transformer_engine(precision: PrecisionSection) -> bool:
    """Whether Transformer Engine's linear layers and norms are wanted."""
    return precision.transformer_impl == "transformer_engine"


def uses_delayed_scaling(precision: PrecisionSection) -> bool:
    """Whether FP8 scales come from earlier steps."""
    return precision.fp8 is not None and precision.fp8_recipe == "delayed"


def core_fields(precision: PrecisionSection) -> dict[str, Any]:
    """The fields of megatron-core's TransformerConfig; from them it makes Transformer Engine's recipe.

    Our own FP8 layers are chosen by the layer spec: megatron-core knows nothing of them.
    """
    dtype = compute_dtype(precision)
    fields: dict[str, Any] = {"params_dtype": dtype, "pipeline_dtype": dtype, "bf16": precision.bf16}
    if precision.fp8 is None or not uses_transformer_engine(precision):
        return fields
    return fields | {
        "fp8": precision.fp8,
        "fp8_recipe": precision.fp8_recipe,
        "fp8_margin": precision.fp8_margin,
        "fp8_amax_history_len": precision.fp8_amax_history_len,
        "fp8_amax_compute_algo": precision.fp8_amax_compute_algo,
        "fp8_param": precision.fp8_param_gather,
        "first_last_layers_bf16": precision.num_bf16_layers > 0,
        "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
    }


def torch_fp8(precision: PrecisionSection) -> TorchFp8 | None:
    """Settings of our own FP8 layers; None where there are none."""
    if precision.fp8 is None or uses_transformer_engine(precision):
        return None
    return TorchFp8(
        forward=torch.float8_e4m3fn,
        backward=torch.float8_e5m2 if precision.fp8 == "hybrid" else torch.float8_e4m3fn,
        rowwise=precision.fp8_recipe == "rowwise",
        margin=precision.fp8_margin,
    )


def in_fp8(precision: PrecisionSection, layer: int, num_layers: int) -> bool:
    """Whether a layer, counted from 0 through the whole network, computes in FP8."""
    first, behind = precision.num_layers_at_start_in_bf16, num_layers - precision.num_layers_at_end_in_bf16
    return precision.fp8 is not None and first <= layer < behind


def check_machine(precision: PrecisionSection) -> None:
    """Refuses what this machine cannot compute.

    Raises:
        InputError: Names the setting, what is missing and what to set instead.
    """
    if uses_transformer_engine(precision):
        check_transformer_engine("precision.transformer_impl = transformer_engine", "--transformer-impl local")
    if precision.fp8 is None or not has_cuda():
        return
    capability = torch.cuda.get_device_capability()
    needed = _MXFP8_CAPABILITY if precision.fp8_recipe == "mxfp8" else _FP8_CAPABILITY
    if capability < needed:
        raise InputError(
            f"precision.fp8 = {precision.fp8} with fp8_recipe = {precision.fp8_recipe} needs a GPU of compute "
            f"capability {needed[0]}.{needed[1]}; {torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}: "
            + ("take another --fp8-recipe" if capability >= _FP8_CAPABILITY else "leave --fp8-format out")
        )
    _check_cuda(precision)


def _check_cuda(precision: PrecisionSection) -> None:
    version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    if precision.fp8_recipe == "blockwise" and version < _BLOCKWISE_CUDA:
        raise InputError(
            f"precision.fp8_recipe = blockwise needs a torch of CUDA {_BLOCKWISE_CUDA[0]}.{_BLOCKWISE_CUDA[1]}; this "
            f"one is of {torch.version.cuda}: take another --fp8-recipe"
        )


def check_transformer_engine(setting: str, instead: str) -> None:
    """Refuses a setting that needs Transformer Engine where that cannot run.

    Raises:
        InputError: There is no CUDA device, or Transformer Engine is not installed.
    """
    if not has_cuda():
        raise InputError(f"{setting} needs a CUDA device, and there is none here; take {instead}")
    if find_spec("transformer_engine") is None:
        raise InputError(
            f"{setting}: Transformer Engine is not installed; install `megatron_tspin[te]`, or take {instead}"
        )


def describe(precision: PrecisionSection) -> str:
    """One line for the log: what is computed in which format, and by what."""
    base = "bf16 with fp32 masters" if precision.bf16 else "fp32"
    by = "Transformer Engine" if uses_transformer_engine(precision) else "torch"
    if precision.fp8 is None:
        return f"{base}, linear layers by {by}"
    kept = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    outside = f", first {kept[0]} and last {kept[1]} layers in bf16" if any(kept) else ""
    return f"{base}, linear layers in FP8 ({precision.fp8}, {precision.fp8_recipe} scaling) by {by}{outside}"
