"""Transformer Engine's modules one by one against torch in fp32, and a policy made of them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tspin.benchmark.gpu_report.check import TIMES, Case, Figures, Meaning, SkippedError
from megatron_tspin.benchmark.gpu_report.formats import FORMATS, LOCAL_FP32, TRAINED
from megatron_tspin.benchmark.stopwatch import measure
from megatron_tspin.config import TrainingSection
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.platform import device, has_cuda

_TOKENS, _IN, _OUT = 512, 1024, 4096
_EPSILON = 1e-5
_RECIPES = {
    "delayed": "DelayedScaling",
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
}
_ADAM_STEPS = 5
_PASSES = 2  # delayed scales come from the first one

_RELATIVE = "norm of the difference from torch in fp32 on the same bf16 values, over the norm of the latter: "
FIGURES = {
    "out": Meaning("", _RELATIVE + "the result; FusedAdam: the parameters; the policy: its log-probs"),
    "input_gradient": Meaning("", _RELATIVE + "gradient of the input"),
    "weight_gradient": Meaning("", _RELATIVE + "gradient of the weight; the policy: of all weights together"),
    "first_seconds": TIMES["first_seconds"],
}


def cases(reduced: bool) -> list[Case]:
    """Modules, the optimizer, and our policy, also with torch's layers for comparison."""
    linears = [("Linear bf16", None), *((f"Linear FP8 {name}", name) for name in _RECIPES)]
    fused = [("LayerNormLinear bf16", None), ("LayerNormLinear FP8 tensorwise", "tensorwise")]
    return [
        *(Case(name, partial(_module, _linear, recipe)) for name, recipe in linears),
        Case("RMSNorm bf16", partial(_module, _norm, None)),
        *(Case(name, partial(_module, _norm_linear, recipe)) for name, recipe in fused),
        Case("FusedAdam", _adam),
        *(Case(f"policy of 2 layers, {name}", partial(_policy, name, reduced)) for name in TRAINED),
    ]


def _transformer_engine() -> Any:
    """`transformer_engine.pytorch`.

    Raises:
        SkippedError: It is not installed, or there is no GPU.
    """
    if find_spec("transformer_engine") is None:
        raise SkippedError("Transformer Engine is not installed")
    if not has_cuda():
        raise SkippedError("no CUDA device")
    import transformer_engine.pytorch as te

    return te


def _linear(te: Any) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]]:
    return te.Linear(_IN, _OUT, bias=False, params_dtype=torch.bfloat16), F.linear


def _norm(te: Any) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]]:
    return te.RMSNorm(_IN, eps=_EPSILON, params_dtype=torch.bfloat16), _rms_norm


def _norm_linear(te: Any) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]]:
    module = te.LayerNormLinear(
        _IN, _OUT, eps=_EPSILON, bias=False, normalization="RMSNorm", params_dtype=torch.bfloat16
    )
    return module, lambda given, weight: F.linear(F.rms_norm(given, (_IN,), eps=_EPSILON), weight)


def _rms_norm(given: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(given, (_IN,), weight, _EPSILON)


def _module(make: Callable[[Any], tuple[Any, Callable[[Tensor, Tensor], Tensor]]], recipe: str | None) -> Figures:
    """Forward and backward of a module beside its fp32 reference."""
    te = _transformer_engine()
    torch.manual_seed(0)
    module, reference = make(te)
    module.to(device())
    given = torch.randn(_TOKENS, _IN, device=device(), dtype=torch.bfloat16, requires_grad=True)
    outputs: list[Tensor] = []

    def forward() -> None:
        with _autocast(te, recipe):
            outputs.append(module(given))

    # Delayed scales come from earlier passes, so that the second pass counts.
    first = measure(forward, seconds=0.0, warm_ups=0).first
    slope = torch.randn_like(outputs[-1])
    torch.autograd.backward(outputs[-1], slope)
    wide, weight = (each.detach().float().requires_grad_() for each in (given, module.weight))
    expected = reference(wide, weight)
    torch.autograd.backward(expected, slope.float())
    return {
        "out": relative(outputs[-1], expected),
        "input_gradient": relative(given.grad, wide.grad),
        "weight_gradient": relative(module.weight.grad, weight.grad),
        "first_seconds": first,
    }


def _autocast(te: Any, recipe: str | None) -> AbstractContextManager[Any]:
    if recipe is None:
        return nullcontext()
    from transformer_engine.common import recipe as recipes

    context: AbstractContextManager[Any] = te.autocast(enabled=True, recipe=getattr(recipes, _RECIPES[recipe])())
    return context


def relative(found: Tensor | None, expected: Tensor | None) -> float:
    """Norm of the difference over the norm of what is expected."""
    assert found is not None and expected is not None
    wide = expected.detach().double()
    return float((found.detach().double() - wide).norm() / wide.norm())


def _adam() -> Figures:
    """Updates by FusedAdam beside torch's AdamW, both in fp32, relative to the update."""
    te = _transformer_engine()
    torch.manual_seed(0)
    start = torch.randn(_IN * _IN, device=device())
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    fused = te.optimizers.FusedAdam([ours], **settings)
    plain = torch.optim.AdamW([theirs], **settings)
    for _ in range(_ADAM_STEPS):
        ours.grad = torch.randn_like(start)
        theirs.grad = ours.grad.clone()
        fused.step()
        plain.step()
    return {"out": relative(ours - start, theirs - start)}


def _policy(name: str, reduced: bool) -> Figures:
    """Our policy in a number format beside the one in fp32, forward and backward."""
    from megatron_tspin.benchmark.gpu_report.policies import SMOLLM2, TINY, architecture, require

    require(FORMATS[name])
    torch.backends.cuda.matmul.allow_tf32 = False
    shape = architecture(TINY if reduced else SMOLLM2, layers=2)
    log_probs, gradient = _trained(shape, name, "auto")
    expected, expected_gradient = _trained(shape, LOCAL_FP32, "dense")
    return {"out": relative(log_probs, expected), "weight_gradient": relative(gradient, expected_gradient)}


def _trained(shape: Architecture, name: str, attention: Literal["auto", "dense"]) -> tuple[Tensor, Tensor]:
    """Log-probs of tokens, and the gradient of their sum in megatron-core's fp32 buffers, all weights but norms."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_tspin.benchmark.gpu_report.policies import random_policy
    from megatron_tspin.benchmark.gpu_report.responses import draw_rows, token_log_probs

    policy = random_policy(shape, FORMATS[name], TrainingSection(packed_attention=attention))
    wrapped = DistributedDataParallel(policy.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), policy)
    rows, _ = draw_rows(shape, triplets=2)
    for _ in range(_PASSES):
        wrapped.zero_grad_buffer()
        log_probs = token_log_probs(policy, rows)
        torch.autograd.backward(log_probs.sum())
    # Names of Transformer Engine's fused norms differ; without them both have the same parameters.
    weights = [weight for name, weight in sorted(policy.named_parameters()) if "norm" not in name]
    return log_probs.detach(), torch.cat([weight.main_grad.flatten() for weight in weights])
