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
from torch import Tensor

from megatron_tspin.models.row_layout import RowLayout
from megatron_tspin.models.scores import Scores, attend
from megatron_tspin.models.segment_attention import attend_by_plan
from megatron_tspin.models.segment_plan import plan_segments
from megatron_tspin.models.te_attention import fits, thd_attention

PackedAttention = Callable[[Tensor, Tensor, Tensor, RowLayout, Scores], Tensor]
"""Queries [s, heads, d] of this rank, keys and values [t, key groups, d] of the whole row, the layout, and how
keys are scored; returns [s, heads, d]."""


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


def dense_attention(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scores: Scores) -> Tensor:
    """SDPA under `visible`."""
    window = scores.window
    mask: Tensor = layout.cached(("dense", window, query.device), lambda: visible(layout, window, query.device))
    repeats = query.shape[1] // key.shape[1]
    q, k, v = query.transpose(0, 1), *(part.transpose(0, 1).repeat_interleave(repeats, 0) for part in (key, value))
    out = attend(q[None], k[None], v[None], mask, scores)
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


def flex_attention(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scores: Scores) -> Tensor:
    """FlexAttention; the block mask is built once a row."""
    window = scores.window
    mask = layout.cached(("flex", window, query.device), lambda: flex_block_mask(layout, window, query.device))
    q, k, v = (part.transpose(0, 1)[None] for part in (query, key, value))
    shared_keys = query.shape[1] != key.shape[1]
    out: Tensor = _flex(query.is_cuda)(
        q, k, v, score_mod=_capped(scores.cap), block_mask=mask, scale=scores.scale, enable_gqa=shared_keys
    )
    return out.squeeze(0).transpose(0, 1)


def flex_block_mask(layout: RowLayout, window: int | None, device: torch.device) -> Any:
    """FlexAttention's BlockMask of this rank's queries against the row's keys."""
    from torch.nn.attention.flex_attention import create_block_mask

    facts, held = layout.token_facts(device), layout.held.to(device)

    def mask_mod(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _sees(facts, held[query], key, window)

    return create_block_mask(mask_mod, None, None, len(held), layout.length, device=str(device))


@cache
def _capped(cap: float | None) -> Callable[..., Tensor] | None:
    """FlexAttention's hook for scores."""
    if cap is None:
        return None

    def score_mod(score: Tensor, *_: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


@cache
def _flex(compiled: bool) -> Any:
    """Compiled, the kernel skips blocks without an entry; not compiled it is dense, for tests without CUDA."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    return torch.compile(flex, dynamic=True) if compiled else flex


def segment_attention(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scores: Scores) -> Tensor:
    """By `segment_plan`, made once a row. A window that some sequence exceeds goes to `dense`, and so does a cap."""
    if scores.cap is not None or (scores.window is not None and layout.longest_sequence > scores.window):
        return dense_attention(query, key, value, layout, scores)
    heads = (query.shape[1], *key.shape[1:])
    plan = layout.cached(("segments", *heads), lambda: plan_segments(layout, *heads))
    return attend_by_plan(query, key, value, plan, scores.scale)


def te_attention(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scores: Scores) -> Tensor:
    """Transformer Engine's; what it cannot express (a scored prompt with two responses, a cap) goes to `flex`."""
    if scores.cap is None and fits(layout):
        return thd_attention(query, key, value, layout, scores)
    return flex_attention(query, key, value, layout, scores)


BACKENDS: dict[str, PackedAttention] = {
    "segments": segment_attention,
    "flex": flex_attention,
    "thd": te_attention,
    "dense": dense_attention,
}
