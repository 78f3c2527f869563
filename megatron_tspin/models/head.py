"""The head: hidden states to log-probs of responses, over a vocabulary that is split across TP.

Only positions that predict a response token meet the output matrix. Rows of the padded vocabulary are masked: they
take no part in the softmax.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ResponseTargets:
    """Which positions predict which response token; the interface between a layout of rows and the head.

    Attributes:
        positions: int64 [n], flat indices into hidden states [s, b, h] seen as [s * b, h].
        token_ids: int64 [n], the token that each position predicts.
        response_index: int64 [n], the response that the token belongs to.
        num_responses: Number of responses in the micro-batch.
    """

    positions: Tensor
    token_ids: Tensor
    response_index: Tensor
    num_responses: int

    def to(self, device: torch.device) -> "ResponseTargets":
        """The same on another device."""
        return ResponseTargets(
            self.positions.to(device, non_blocking=True),
            self.token_ids.to(device, non_blocking=True),
            self.response_index.to(device, non_blocking=True),
            self.num_responses,
        )


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of the vocabulary that this TP rank holds, and the group that holds the others."""

    first: int
    size: int
    valid: int
    """Rows of this shard that are real tokens; the others are padding."""
    group: dist.ProcessGroup

    def split(self) -> bool:
        """Whether other ranks hold part of the vocabulary."""
        return self.group.size() > 1


def token_log_probs(hidden: Tensor, weight: Tensor, token_ids: Tensor, shard: VocabularyShard) -> Tensor:
    """Log-prob of each token given the hidden state that predicts it, in fp32.

    Args:
        hidden: [n, h], the same on every TP rank; its gradient is this rank's share, to be summed over TP.
        weight: [shard.size, h], this rank's rows of the output matrix.
        token_ids: int64 [n].
        shard: Where the rows belong.

    Returns:
        fp32 [n], the same on every TP rank.
    """
    logits = torch.nn.functional.linear(hidden, weight)
    log_probs: Tensor = _VocabularyParallelLogProb.apply(logits, token_ids, shard)  # type: ignore[no-untyped-call]  # torch's
    return log_probs


def sum_by_response(values: Tensor, targets: ResponseTargets) -> Tensor:
    """Sums fp32 [n] token values into fp32 [num_responses]."""
    return values.new_zeros(targets.num_responses).index_add(0, targets.response_index, values)


class _VocabularyParallelLogProb(torch.autograd.Function):
    """log softmax at one index, over a vocabulary split across ranks. Gradient: one-hot minus softmax."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor, shard: VocabularyShard) -> Tensor:
        wide = logits.float()  # fp32 logits are changed in place: `token_log_probs` is their only owner
        wide[:, shard.valid :] = -torch.inf
        largest = wide.max(dim=-1).values
        if shard.split():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=shard.group)
        exponentials = torch.exp(wide - largest[:, None])
        local = token_ids - shard.first
        owned = (local >= 0) & (local < shard.size)
        local = local.clamp(0, shard.size - 1)
        target = torch.where(owned, wide.gather(1, local[:, None])[:, 0] - largest, 0.0)
        sums = torch.stack((exponentials.sum(dim=-1), target))
        if shard.split():
            dist.all_reduce(sums, group=shard.group)
        total, target = sums
        ctx.save_for_backward(exponentials.div_(total[:, None]), local, owned)
        ctx.dtype = logits.dtype
        log_probs: Tensor = target - torch.log(total)
        return log_probs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        softmax, local, owned = ctx.saved_tensors
        gradient = softmax * -gradients[0][:, None]
        gradient.scatter_add_(1, local[:, None], (owned * gradients[0])[:, None])
        return gradient.to(ctx.dtype), None, None


def full_logits(hidden: Tensor, weight: Tensor, shard: VocabularyShard, vocab_size: int) -> Tensor:
    """Logits fp32 [n, vocab_size] of every real token, gathered over TP; for sampling, without gradient."""
    local = torch.nn.functional.linear(hidden, weight).float().contiguous()
    if not shard.split():
        return local[:, :vocab_size]
    parts = [torch.empty_like(local) for _ in range(shard.group.size())]
    dist.all_gather(parts, local, group=shard.group)
    return torch.cat(parts, dim=-1)[:, :vocab_size]
