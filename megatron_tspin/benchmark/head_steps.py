"""The head alone, forward and backward, in the ways that are compared, and what one of them takes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_tspin.benchmark.memory import PeakMemory
from megatron_tspin.benchmark.stopwatch import Timing, measure, timed
from megatron_tspin.models.head import ResponseTargets, VocabularyShard, sequence_log_probs
from megatron_tspin.platform import device, has_cuda

_TOKENS_PER_RESPONSE = 64

Step = Callable[[], float]
"""One pass; returns the sum of the log-probs."""


@dataclass(frozen=True)
class HeadInputs:
    """Hidden states [tokens, h] and weight [vocab, h], both with zero gradients in place; token ids int64 [tokens]."""

    hidden: Tensor
    weight: Tensor
    token_ids: Tensor


@dataclass(frozen=True)
class HeadCost:
    """What a step takes: times, peak memory above the inputs and their gradients, and the sum of the log-probs."""

    timing: Timing
    peak_mib: float
    log_prob: float


def random_inputs(tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> HeadInputs:
    """The variance of a hidden state times a row of the weight is 1 / h."""
    generator = torch.Generator(device()).manual_seed(0)
    hidden, weight = (
        torch.randn(size, hidden_size, generator=generator, device=device()).div_(hidden_size**0.5).to(dtype)
        for size in (tokens, vocab_size)
    )
    token_ids = torch.randint(0, vocab_size, (tokens,), generator=generator, device=device())
    for tensor in (hidden, weight):
        tensor.requires_grad_()
        tensor.grad = torch.zeros_like(tensor).fill_(0)  # a training step adds to gradients that are there
    return HeadInputs(hidden, weight, token_ids)


def measure_head(step: Step, seconds: float) -> HeadCost:
    """Runs a step once, and then for about so many seconds.

    Args:
        step: Its inputs are there; nothing else of it is.
        seconds: See `stopwatch.measure`.
    """
    memory = PeakMemory()
    log_prob, first = timed(step)
    if has_cuda():  # the libraries' workspaces are no memory of a step
        memory = PeakMemory()
    timing = measure(step, seconds, warm_ups=0)
    return HeadCost(replace(timing, first=first), memory.peak_mib(), log_prob)


def full_logits_step(inputs: HeadInputs) -> Step:
    """Linear, log-softmax in fp32, gather: what transformers and TRL run."""

    def step() -> float:
        logits = F.linear(inputs.hidden, inputs.weight).float()
        total = logits.log_softmax(dim=-1).gather(1, inputs.token_ids[:, None]).sum()
        torch.autograd.backward(total)
        return total.detach().item()

    return step


def own_step(inputs: HeadInputs, group: Any) -> Step:
    """`models.head` in a group of this process alone, with the gradient buffer that megatron-core's DDP makes."""
    weight: Any = inputs.weight
    vocab_size, count = weight.shape[0], len(inputs.token_ids)
    shard = VocabularyShard(first=0, size=vocab_size, valid=vocab_size, group=group)
    positions = torch.arange(count, device=inputs.token_ids.device)
    owners = positions // _TOKENS_PER_RESPONSE
    targets = ResponseTargets(positions, inputs.token_ids, owners, int(owners.max()) + 1)
    weight.main_grad, weight.grad = weight.grad.float(), None

    def step() -> float:
        total = sequence_log_probs(inputs.hidden, weight, targets, shard).sum()
        torch.autograd.backward(total)
        weight.grad = None  # megatron-core's hook drops it: the gradient is in main_grad
        return total.detach().item()

    return step


def cross_entropy_step(inputs: HeadInputs, chunk: int) -> Step:
    """Cross-entropy of fp32 logits, compiled where there is a GPU; chunks compute theirs again in backward."""
    compute = torch.compile(_log_prob, dynamic=True) if has_cuda() else _log_prob
    whole = chunk >= len(inputs.token_ids)

    def of_chunk(states: Tensor, token_ids: Tensor) -> Any:
        if whole:
            return compute(states, inputs.weight, token_ids)
        return checkpoint(compute, states, inputs.weight, token_ids, use_reentrant=False)

    def step() -> float:
        total = inputs.hidden.new_zeros((), dtype=torch.float32)
        for part in zip(torch.split(inputs.hidden, chunk), torch.split(inputs.token_ids, chunk), strict=True):
            total = total + of_chunk(*part)
        torch.autograd.backward(total)
        return total.detach().item()

    return step


def _log_prob(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight).float(), token_ids, reduction="sum")
