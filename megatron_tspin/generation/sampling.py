"""From logits to a token, with randomness that depends on nothing but its key."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Decoding:
    """How to choose tokens; temperature 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


def keyed_uniforms(seed: int, purpose: str, prompt_id: str, count: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one for each position of one prompt's response.

    Args:
        seed: Of the run.
        purpose: What the response is for, e.g. "synthetic/2"; another purpose gives an independent response.
        prompt_id: The prompt.
        count: Number of positions.

    Returns:
        float64 [count]; the same on every machine, layout and batch.
    """
    key = hashlib.blake2b(f"{seed}/{purpose}/{prompt_id}".encode(), digest_size=16).digest()
    # numpy promises the raw stream of a bit generator for all versions.
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
    uniforms: NDArray[np.float64] = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniforms


def choose(logits: Tensor, uniforms: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Chooses the next token of each row.

    Args:
        logits: fp32 [b, V].
        uniforms: float64 [b]; not read when greedy.
        decoding: Temperature, top-p, top-k.

    Returns:
        Token ids int64 [b], and their log-probs fp32 [b] at temperature 1 without truncation: what training scores.
    """
    if decoding.temperature == 0.0:
        chosen = logits.argmax(dim=-1)
    else:
        chosen = _inverse_cdf(_truncated(logits, decoding), uniforms)
    log_probs = torch.log_softmax(logits, dim=-1).gather(1, chosen[:, None])[:, 0]
    return chosen, log_probs


def _truncated(logits: Tensor, decoding: Decoding) -> Tensor:
    """Probabilities float64 [b, V], zero outside top-k and top-p; they need not sum to one."""
    scaled = logits.double() / decoding.temperature
    if decoding.top_k and decoding.top_k < scaled.shape[-1]:
        smallest = scaled.topk(decoding.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    probabilities = torch.softmax(scaled, dim=-1)
    if decoding.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        probabilities = probabilities.scatter(1, order, ordered.masked_fill(before >= decoding.top_p, 0.0))
    return probabilities


def _inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds uniform * total, int64 [b]."""
    cumulative = probabilities.cumsum(dim=-1)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    # Rounding can put the threshold at the total; the last token with any probability is meant then.
    last = probabilities.shape[-1] - 1 - probabilities.flip(-1).gt(0).int().argmax(dim=-1)
    return torch.minimum(chosen, last)
