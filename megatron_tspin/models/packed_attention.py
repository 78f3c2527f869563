"""Attention over a packed row, by backend. All give the same numbers up to rounding.

segments  torch's CPU flash kernel without a mask, large bundles block by block, small ones side by side
flex      torch's FlexAttention with a block mask that the layers share (CUDA)
thd       Transformer Engine's attention, for rows whose prompts are not shared (CUDA); shared ones go to flex
dense     one SDPA with a mask of [queries, keys]: readable, the reference for the others
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tspin.models.row_layout import RowLayout
from megatron_tspin.models.segment_attention import attend_by_plan
from megatron_tspin.models.segment_plan import plan_segments
from megatron_tspin.models.te_attention import fits, thd_attention

PackedAttention = Callable[[Tensor, Tensor, Tensor, RowLayout, float, int | None], Tensor]
"""Queries [s, heads, d] of this rank, keys and values [t, key groups, d] of the whole row, the layout, the softmax
scale, and the sliding window; returns [s, heads, d]."""


def choose_backend(name: str, device: torch.device, engine: bool = False, share_prompts: bool = True) -> str:
    """The backend that "auto" means, or the one named.

    Args:
        name: As configured.
        device: Where it has to run.
        engine: Whether the layers are Transformer Engine's.
        share_prompts: Whether responses share their prompt.
    """
    if name != "auto":
        return name
    if device.type != "cuda":
        return "segments"
    return "thd" if engine and not share_prompts else "flex"


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scale: float, window: int | None
) -> Tensor:
    """SDPA under `visible`."""
    mask: Tensor = layout.cached(("dense", query.device), lambda: visible(layout, window, query.device))
    repeats = query.shape[1] // key.shape[1]
    q, k, v = query.transpose(0, 1), *(part.transpose(0, 1).repeat_interleave(repeats, 0) for part in (key, value))
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)
    return out.squeeze(0).transpose(0, 1)


def visible(layout: RowLayout, window: int | None, device: torch.device) -> Tensor:
    """Bool [queries of this rank, keys of the row]: True where a query sees a key. Padding sees itself alone."""
    facts = layout.token_facts(device)
    index = torch.arange(layout.length, device=device)
    held = layout.held.to(device)
    return _sees(facts, held[:, None], index[None, :], window)


def _sees(facts: Tensor, query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """The rule of a packed row, for row indices of queries and keys that broadcast against each other."""
    bundle, segment, position = facts
    same = (bundle[query] == bundle[key]) & (bundle[query] >= 0)
    seen: Tensor = same & (key <= query) & ((segment[key] == 0) | (segment[key] == segment[query]))
    if window is not None:
        seen = seen & (position[query] - position[key] < window)
    return seen | (query == key)


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scale: float, window: int | None
) -> Tensor:
    """FlexAttention; the block mask is built once a row."""
    mask = layout.cached(("flex", query.device), lambda: flex_block_mask(layout, window, query.device))
    q, k, v = (part.transpose(0, 1)[None] for part in (query, key, value))
    shared_keys = query.shape[1] != key.shape[1]
    out: Tensor = _flex(query.is_cuda)(q, k, v, block_mask=mask, scale=scale, enable_gqa=shared_keys)
    return out.squeeze(0).transpose(0, 1)


def flex_block_mask(layout: RowLayout, window: int | None, device: torch.device) -> Any:
    """FlexAttention's BlockMask of this rank's queries against the row's keys."""
    from torch.nn.attention.flex_attention import create_block_mask

    facts, held = layout.token_facts(device), layout.held.to(device)

    def mask_mod(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _sees(facts, held[query], key, window)

    return create_block_mask(mask_mod, None, None, len(held), layout.length, device=str(device))


@cache
def _flex(compiled: bool) -> Any:
    """Compiled, the kernel skips blocks without an entry; not compiled it is dense, for tests without CUDA."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    return torch.compile(flex, dynamic=True) if compiled else flex


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scale: float, window: int | None
) -> Tensor:
    """By `segment_plan`, made once a row. A window that some sequence exceeds goes to `dense`."""
    if window is not None and layout.longest_sequence > window:
        return dense_attention(query, key, value, layout, scale, window)
    heads = (query.shape[1], *key.shape[1:])
    plan = layout.cached(("segments", *heads), lambda: plan_segments(layout, *heads))
    return attend_by_plan(query, key, value, plan, scale)


def te_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scale: float, window: int | None
) -> Tensor:
    """Transformer Engine's attention; rows that it cannot express (a scored prompt with two responses) go to `flex`."""
    attend = thd_attention if fits(layout) else flex_attention
    return attend(query, key, value, layout, scale, window)


BACKENDS: dict[str, PackedAttention] = {
    "segments": segment_attention,
    "flex": flex_attention,
    "thd": te_attention,
    "dense": dense_attention,
}
