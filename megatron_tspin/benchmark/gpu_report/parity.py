"""What a number format does to log-probs: the policy in each of them against fp32 of the same weights."""

import gc
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor

from megatron_tspin.benchmark.gpu_report.check import Case, Figures, Meaning
from megatron_tspin.benchmark.gpu_report.formats import FORMATS, LOCAL_FP32
from megatron_tspin.benchmark.gpu_report.policies import MISTRAL, SMOLLM2, TINY, architecture, random_policy, require
from megatron_tspin.benchmark.gpu_report.responses import draw_rows, token_log_probs
from megatron_tspin.config import TrainingSection

_MODELS = {SMOLLM2: None, MISTRAL: 4}
_REDUCED_MODELS = {TINY: 2}
_IN_BOTH_FP8_TYPES = (SMOLLM2, TINY)
_TRIPLETS, _REDUCED_TRIPLETS = 16, 2
_WARM_UPS = 3
"""Passes that delayed scaling learns its scales from."""

_RESPONSE = "log-probs of whole responses, format less fp32: "
_TOKEN = "log-probs of single tokens, format less fp32: "
FIGURES = {
    "mean": Meaning("nats", _RESPONSE + "mean"),
    "std": Meaning("nats", _RESPONSE + "standard deviation"),
    "p95": Meaning("nats", _RESPONSE + "95th percentile of the magnitude"),
    "max": Meaning("nats", _RESPONSE + "largest magnitude"),
    "t_mean": Meaning("nats", _TOKEN + "mean"),
    "t_std": Meaning("nats", _TOKEN + "standard deviation"),
    "t_p95": Meaning("nats", _TOKEN + "95th percentile of the magnitude"),
    "t_max": Meaning("nats", _TOKEN + "largest magnitude"),
    "responses": Meaning("", "number of responses, of 50 to 400 random tokens"),
    "tokens": Meaning("", "number of response tokens"),
    "spread": Meaning("nats", "standard deviation of the fp32 log-probs of single tokens, for scale"),
    "layers": Meaning("", "decoder layers of the model"),
}


def cases(reduced: bool) -> list[Case]:
    """Every format; e4m3 and hybrid differ in backward only, so that both on one shape are enough."""
    models = _REDUCED_MODELS if reduced else _MODELS
    return [
        Case(f"{name} | {shape}", partial(_compare, name, shape, layers, reduced))
        for shape, layers in models.items()
        for name in FORMATS
        if shape in _IN_BOTH_FP8_TYPES or "hybrid" not in name
    ]


def _compare(name: str, shape: str, layers: int | None, reduced: bool) -> Figures:
    require(FORMATS[name])
    triplets = _REDUCED_TRIPLETS if reduced else _TRIPLETS
    expected = _reference(shape, layers, triplets)
    _, owners = draw_rows(architecture(shape, layers), triplets)
    by_token = _log_probs(name, shape, layers, triplets, "auto") - expected
    by_response = torch.zeros(int(owners.max()) + 1, dtype=torch.float64).index_add_(0, owners, by_token)
    return {
        **_summary(by_response, ""),
        **_summary(by_token, "t_"),
        "responses": float(len(by_response)),
        "tokens": float(len(by_token)),
        "spread": expected.std().item(),
        "layers": float(architecture(shape, layers).num_layers),
    }


def _summary(differences: Tensor, prefix: str) -> dict[str, float]:
    magnitude = differences.abs()
    return {
        f"{prefix}mean": differences.mean().item(),
        f"{prefix}std": differences.std().item(),
        f"{prefix}p95": magnitude.quantile(0.95).item(),
        f"{prefix}max": magnitude.max().item(),
    }


@cache
def _reference(shape: str, layers: int | None, triplets: int) -> Tensor:
    """In fp32, with the reference attention."""
    return _log_probs(LOCAL_FP32, shape, layers, triplets, "dense")


def _log_probs(name: str, shape: str, layers: int | None, triplets: int, attention: Literal["auto", "dense"]) -> Tensor:
    """Float64 [tokens] on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = architecture(shape, layers)
    rows, _ = draw_rows(model, triplets)
    policy = random_policy(model, FORMATS[name], TrainingSection(packed_attention=attention))
    if FORMATS[name].fp8_recipe == "delayed" and FORMATS[name].fp8 is not None:
        for _ in range(_WARM_UPS):  # with gradients: Transformer Engine learns scales only then
            token_log_probs(policy, rows[:1])
    with torch.no_grad():
        found = token_log_probs(policy, rows).double().cpu()
    del policy
    gc.collect()
    if not bool(found.isfinite().all()):
        raise ArithmeticError(f"{int((~found.isfinite()).sum())} of {len(found)} log-probs are not finite")
    return found
