"""How attention scores a key, the same for every backend."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Facts of one layer's attention."""

    scale: float
    """What products of queries and keys are multiplied with."""
    window: int | None = None
    """Keys that a query sees, itself included; None: all."""
    cap: float | None = None
    """Scores become cap * tanh(score / cap)."""


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scores: Scores) -> Tensor:
    """Attention of queries [b, heads, q, d] over keys and values [b, heads, k, d]; returns [b, heads, q, d].

    Args:
        query: See above.
        key: See above.
        value: See above.
        seen: Bool, broadcast to [b, heads, q, k]: True where a query sees a key. None: as many keys as queries, causal.
            It has to contain the window.
        scores: Scale and cap.
    """
    if scores.cap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=seen is None, scale=scores.scale
        )
    if seen is None:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    products = query @ key.transpose(-1, -2) * scores.scale
    capped = scores.cap * torch.tanh(products / scores.cap)
    weights = torch.softmax(capped.masked_fill(~seen, -torch.inf), dim=-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value
