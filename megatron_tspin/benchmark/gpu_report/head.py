"""Memory and speed of the head alone, beside full logits and compiled cross-entropy."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_tspin.benchmark.gpu_report.case import Case, Figures
from megatron_tspin.benchmark.gpu_report.catalogue import Meaning
from megatron_tspin.benchmark.gpu_report.policies import topology
from megatron_tspin.benchmark.gpu_report.stopwatch import MEANINGS, measure
from megatron_tspin.benchmark.head import full_logits_step, head_inputs, own_step
from megatron_tspin.benchmark.memory import PeakMemory
from megatron_tspin.platform import has_cuda

_WIDTH, _REDUCED_WIDTH = 4096, 64
_VOCABULARIES, _REDUCED_VOCABULARIES = (32768, 131072, 262144), (1024,)
_TOKENS, _REDUCED_TOKENS = (2048, 8192), (128,)
_CHUNK, _REDUCED_CHUNK = 1024, 64
_SECONDS = 0.3

FIGURES = {
    **MEANINGS,
    "peak_mib": Meaning("MiB", "peak memory above weight, hidden states and the gradients of both"),
    "log_prob": Meaning("nats", "sum of the log-probs, which all variants have to agree on"),
    "width": Meaning("", "size of a hidden state; bf16 on a GPU, fp32 on a CPU"),
    "chunk": Meaning("tokens", "tokens of a chunk"),
}

Step = Callable[[], object]


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
    hidden, weight, token_ids = head_inputs(tokens, width, vocab_size, dtype)
    chunk = _REDUCED_CHUNK if reduced else _CHUNK
    steps: dict[str, Callable[[], Step]] = {
        "ours": lambda: own_step(hidden, weight, token_ids, group),
        "full": lambda: full_logits_step(hidden, weight, token_ids),
        "compiled": lambda: _cross_entropy_step(hidden, weight, token_ids, tokens),
        "chunks": lambda: _cross_entropy_step(hidden, weight, token_ids, chunk),
    }
    step = steps[variant]()
    first = measure(step, seconds=0.0, warm_ups=0).first
    memory = PeakMemory()
    log_prob = step()
    peak = memory.peak_mib()
    timing = measure(step, _SECONDS)
    assert isinstance(log_prob, float)
    found = {**timing.milliseconds(), "first_seconds": first, "peak_mib": peak, "log_prob": log_prob}
    return found | {"width": float(width)} | ({"chunk": float(chunk)} if variant == "chunks" else {})


def _cross_entropy_step(hidden: Tensor, weight: Tensor, token_ids: Tensor, chunk: int) -> Callable[[], float]:
    """Cross-entropy of fp32 logits, compiled where there is a GPU; chunks compute theirs again in backward."""
    compute = torch.compile(_log_prob, dynamic=True) if has_cuda() else _log_prob
    whole = chunk >= len(token_ids)

    def step() -> float:
        total = hidden.new_zeros((), dtype=torch.float32)
        for states, targets in zip(torch.split(hidden, chunk), torch.split(token_ids, chunk), strict=True):
            part = (
                compute(states, weight, targets)
                if whole
                else checkpoint(compute, states, weight, targets, use_reentrant=False)
            )
            total = total + part
        torch.autograd.backward(total)
        return total.detach().item()

    return step


def _log_prob(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight).float(), token_ids, reduction="sum")
