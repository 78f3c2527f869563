"""From logits to a token, with randomness that depends on nothing but its key, over a vocabulary split across TP.

No rank holds the logits of the whole vocabulary. The ranks exchange a few numbers a row (largest logit, sums of
exponentials, candidates of a truncation), and whose shard the random number falls into looks the token up.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_tspin.models.head import VocabularyShard

_CHUNK = 256
"""Tokens whose probabilities are summed before one of them is looked for."""

_CANDIDATES = 1024
"""Of each shard, sorted to find the limit of top-p; more, if these turn out to be too few."""


@dataclass(frozen=True)
class Decoding:
    """How to choose tokens; temperature 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


def answer_seed(seed: int, purpose: str, prompt_id: str, sample: int = 0) -> int:
    """The seed of one answer, below 2**128.

    Args:
        seed: Of the run.
        purpose: What the answer is for, e.g. "synthetic/2"; another purpose gives an independent answer.
        prompt_id: The prompt.
        sample: Number of the answer among those to the same prompt.
    """
    key = f"{seed}/{purpose}/{prompt_id}" + (f"/{sample}" if sample else "")
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")


def uniforms(seed: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one for each position of an answer.

    Args:
        seed: `answer_seed`.
        count: Number of positions.

    Returns:
        float64 [count]; the same on every machine, layout and batch.
    """
    # numpy promises the raw stream of a bit generator for all versions.
    raw = np.random.Philox(key=seed).random_raw(count)
    numbers: NDArray[np.float64] = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def choose(logits: Tensor, uniforms: Tensor, decoding: Decoding, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Chooses the next token of each row; the ranks of the shard's group call it together.

    Args:
        logits: fp32 [n, shard.valid] of this shard.
        uniforms: float64 [n]; not read when greedy.
        decoding: Temperature, top-p, top-k.
        shard: Where the logits belong.

    Returns:
        Token ids int64 [n], and their log-probs float64 [n] at temperature 1 without truncation: what training scores.
        Both are the same on all ranks of the group.
    """
    if not shard.valid:  # a vocabulary that ends before this shard; it takes part with a token that is never chosen
        logits = logits.new_full((len(logits), 1), -torch.inf)
    best, place = logits.max(dim=-1)
    tops = _gather(best, shard)
    largest = tops.amax(0)[:, None]
    if decoding.temperature == 1.0 and not _truncates(decoding):
        weights = _weights(logits, largest, 1.0)
        totals = _gather(weights.sum(dim=-1, dtype=torch.float64), shard)
        local, owner = _look_up(weights, totals, uniforms, shard)
        whole = totals.sum(0)
    else:
        # Exponentials relative to the largest are summed once more, for the log-prob at temperature 1.
        whole = _gather(_weights(logits, largest, 1.0).sum(dim=-1, dtype=torch.float64), shard).sum(0)
        if decoding.temperature == 0.0:
            local, owner = place, tops.argmax(0)
        else:
            weights = _weights(logits, largest, decoding.temperature)
            if _truncates(decoding):
                limit = _limit(logits, largest, decoding, shard)
                weights[:, : logits.shape[1]].masked_fill_(logits < limit, 0.0)
            totals = _gather(weights.sum(dim=-1, dtype=torch.float64), shard)
            local, owner = _look_up(weights, totals, uniforms, shard)
    at_token = logits.gather(1, local.clamp(max=logits.shape[1] - 1)[:, None])[:, 0]
    found = torch.stack((local.double() + shard.first, at_token.double()))
    mine = _gather(found, shard).gather(0, owner.expand(1, 2, -1))[0]
    return mine[0].long(), mine[1] - largest[:, 0].double() - whole.log()


def _truncates(decoding: Decoding) -> bool:
    return decoding.top_p < 1.0 or decoding.top_k > 0


def _gather(tensor: Tensor, shard: VocabularyShard) -> Tensor:
    """The tensors of all shards along a new first dimension."""
    if not shard.split():
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(shard.group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=shard.group)
    return torch.stack(parts)


def _weights(logits: Tensor, largest: Tensor, temperature: float) -> Tensor:
    """Exponentials relative to the largest logit [n, 1], fp32 [n, whole chunks], filled up with zeros."""
    columns = logits.shape[1]
    weights = logits.new_empty(len(logits), -(-columns // _CHUNK) * _CHUNK)
    weights[:, columns:] = 0.0
    part = weights[:, :columns]
    torch.sub(logits, largest, out=part)
    if temperature != 1.0:
        part.div_(temperature)
    part.exp_()
    return weights


def _look_up(weights: Tensor, totals: Tensor, uniforms: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative weight exceeds uniform * total.

    Args:
        weights: fp32 [n, whole chunks] of this shard.
        totals: Their sums in all shards, float64 [shards, n].
        uniforms: float64 [n].
        shard: Which of them is this one.

    Returns:
        Places int64 [n] in this shard, meaningful where it is the owner; and the owners int64 [n], the same everywhere.
    """
    cumulative = totals.cumsum(0)
    threshold = uniforms * cumulative[-1]
    owner = _first_above(cumulative.t(), threshold)
    rank = shard.group.rank() if shard.split() else 0
    threshold = threshold - (cumulative[rank] - totals[rank])
    chunks = weights.view(len(weights), -1, _CHUNK)
    sums = chunks.sum(dim=-1, dtype=torch.float64).cumsum(-1)
    chunk = _first_above(sums, threshold)
    before = sums.gather(1, chunk[:, None] - 1 + (chunk == 0)[:, None])[:, 0].masked_fill(chunk == 0, 0.0)
    inside = chunks[torch.arange(len(chunks), device=chunks.device), chunk].double().cumsum(-1)
    return chunk * _CHUNK + _first_above(inside, threshold - before), owner


def _first_above(cumulative: Tensor, threshold: Tensor) -> Tensor:
    """The first place of each row of [n, m] above the threshold [n]; the last that adds to the sum if there is none.

    There is none when rounding puts the threshold at the total. Of NaN it is any place: they are refused later.
    """
    cumulative = cumulative.contiguous()
    found = torch.searchsorted(cumulative, threshold[:, None], right=True)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(found, last)[:, 0].clamp(max=cumulative.shape[-1] - 1)


def _limit(logits: Tensor, largest: Tensor, decoding: Decoding, shard: VocabularyShard) -> Tensor:
    """The smallest logit [n, 1] that top-k and top-p leave, over all shards; equal ones are kept together."""
    count = logits.shape[1]
    limit = torch.full_like(largest, -torch.inf)
    if decoding.top_k:
        limit = _sorted_candidates(logits, min(decoding.top_k, count), shard)[0]
        limit = limit[:, min(decoding.top_k, limit.shape[1]) - 1, None]
    if decoding.top_p == 1.0:
        return limit
    kept = _weights(logits, largest, decoding.temperature)[:, :count].masked_fill_(logits < limit, 0.0)
    total = _gather(kept.sum(dim=-1, dtype=torch.float64), shard).sum(0)[:, None]
    wanted = _CANDIDATES
    while True:
        ordered, complete = _sorted_candidates(logits, min(wanted, count), shard)
        weights = ((ordered.double() - largest) / decoding.temperature).exp().masked_fill(ordered < limit, 0.0)
        before = weights.cumsum(-1) - weights
        # Where every candidate is needed, or where those of a shard that we have not seen come before, look further.
        number = (before < decoding.top_p * total).sum(-1, keepdim=True)
        found = ordered.gather(1, number - 1)
        everything = _gather(torch.tensor([wanted >= count], device=logits.device), shard).all()
        if bool(everything) or bool((found > complete).all()):
            return torch.maximum(found, limit)
        wanted *= 8


def _sorted_candidates(logits: Tensor, count: int, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """The largest logits of all shards, so many of each, in descending order; above what, [n, 1], none is missing."""
    found = logits.topk(count, dim=-1).values
    if not shard.split():
        return found, found[:, -1:]
    size = torch.tensor([count], device=logits.device)
    widest = int(_gather(size, shard).max())
    padded = found.new_full((len(found), widest), -torch.inf)
    padded[:, :count] = found
    smallest = found[:, -1:].masked_fill(torch.tensor(count == logits.shape[1], device=logits.device), -torch.inf)
    return _gather(padded, shard).permute(1, 0, 2).flatten(1).sort(dim=-1, descending=True).values, _gather(
        smallest, shard
    ).amax(0)
