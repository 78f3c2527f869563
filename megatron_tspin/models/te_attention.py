"""Attention of Transformer Engine over rows of ordinary sequences (its format "thd"): cuDNN's or flash attention."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_tspin.models.row_layout import RowLayout
from megatron_tspin.models.scores import Scores


def thd_attention(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scores: Scores) -> Tensor:
    """Causal attention within each sequence; only for rows whose bundles have one response, on CUDA."""
    _, heads, size = query.shape
    kernel = _kernel(heads, key.shape[1], size, scores)
    starts, longest = layout.cached(("thd", query.device), lambda: sequence_starts(layout, query.device))
    out: Tensor = kernel(
        query,
        key,
        value,
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return out.view_as(query)


def fits(layout: RowLayout) -> bool:
    """Whether a row is made of ordinary sequences and lies on this rank as a whole."""
    alone = all(sum(response > 0 for response in bundle.responses) <= 1 for bundle in layout.bundles)
    return alone and layout.context.size == 1


def sequence_starts(layout: RowLayout, device: torch.device) -> tuple[Tensor, int]:
    """Where the sequences of a row start, and where the last one ends, int32; and the tokens of the longest.

    Padding at the row's tail is a sequence too: no token is left without an output.
    """
    ends = [0]
    for bundle in layout.bundles:
        ends.append(ends[-1] + bundle.tokens)
    if ends[-1] < layout.length:
        ends.append(layout.length)
    longest = max(end - start for start, end in zip(ends, ends[1:], strict=False))
    return torch.tensor(ends, dtype=torch.int32, device=device), longest


@cache
def _kernel(heads: int, key_groups: int, size: int, scores: Scores) -> Any:
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads,
        size,
        num_gqa_groups=key_groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        softmax_scale=scores.scale,
        window_size=None if scores.window is None else (scores.window - 1, 0),
    )
