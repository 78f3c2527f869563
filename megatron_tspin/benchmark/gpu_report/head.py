"""Memory and speed of the head alone, beside full logits and compiled cross-entropy."""

from collections.abc import Callable
from functools import partial

import torch

from megatron_tspin.benchmark.gpu_report.check import TIMES, Case, Figures, Meaning
from megatron_tspin.benchmark.gpu_report.policies import topology
from megatron_tspin.benchmark.head_steps import (
    Step,
    cross_entropy_step,
    full_logits_step,
    measure_head,
    own_step,
    random_inputs,
)
from megatron_tspin.platform import has_cuda

_WIDTH, _REDUCED_WIDTH = 4096, 64
_VOCABULARIES, _REDUCED_VOCABULARIES = (32768, 131072, 262144), (1024,)
_TOKENS, _REDUCED_TOKENS = (2048, 8192), (128,)
_CHUNK, _REDUCED_CHUNK = 1024, 64
_SECONDS = 0.3

FIGURES = {
    **TIMES,
    "peak_mib": Meaning("MiB", "peak memory above weight, hidden states and the gradients of both"),
    "log_prob": Meaning("nats", "sum of the log-probs, which all variants have to agree on"),
    "width": Meaning("", "size of a hidden state; bf16 on a GPU, fp32 on a CPU"),
    "chunk": Meaning("tokens", "tokens of a chunk"),
}


def cases(reduced: bool) -> list[Case]:
    """Each variant at each size."""
    vocabularies = _REDUCED_VOCABULARIES if reduced else _VOCABULARIES
    variants = ("ours", "full", *(("compiled", "chunks") if has_cuda() else ("chunks",)))
    sizes = [(size, count) for size in vocabularies for count in (_REDUCED_TOKENS if reduced else _TOKENS)]
    return [
        Case(f"V {size // 1024}k, {count} tokens | {name}", partial(_measure, name, count, size, reduced))
        for name in variants  # those that compile come last, should time be up
        for size, count in sizes
    ]


def _measure(variant: str, tokens: int, vocab_size: int, reduced: bool) -> Figures:
    group = topology().tp_group
    dtype, width = torch.bfloat16 if has_cuda() else torch.float32, _REDUCED_WIDTH if reduced else _WIDTH
    inputs = random_inputs(tokens, width, vocab_size, dtype)
    chunk = _REDUCED_CHUNK if reduced else _CHUNK
    steps: dict[str, Callable[[], Step]] = {
        "ours": lambda: own_step(inputs, group),
        "full": lambda: full_logits_step(inputs),
        "compiled": lambda: cross_entropy_step(inputs, tokens),
        "chunks": lambda: cross_entropy_step(inputs, chunk),
    }
    cost = measure_head(steps[variant](), _SECONDS)
    found = {**cost.timing.milliseconds(), "peak_mib": cost.peak_mib, "log_prob": cost.log_prob, "width": float(width)}
    return found | ({"chunk": float(chunk)} if variant == "chunks" else {})
