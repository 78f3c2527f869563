"""Attention over a packed row, by backend. All give the same numbers up to rounding.

segments  the blocks of `RowLayout.blocks` one by one with torch's CPU flash kernel, joined by their log-sum-exp
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

from megatron_tspin.models.engine_attention import fits, thd_attention
from megatron_tspin.models.row_layout import AttentionBlock, RowLayout

PackedAttention = Callable[[Tensor, Tensor, Tensor, RowLayout, float, int | None], Tensor]
"""Queries [s, heads, d] of this rank, keys and values [t, groups, d] of the whole row, the layout, the softmax scale,
and the sliding window; returns [s, heads, d]."""


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
    group, segment, position = facts
    same = (group[query] == group[key]) & (group[query] >= 0)
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
    """The blocks one by one: no work on what is masked out. A window that some sequence exceeds goes to `dense`."""
    if window is not None and layout.longest_group > window:
        return dense_attention(query, key, value, layout, scale, window)
    out: Tensor = _SegmentAttention.apply(query, key, value, layout.blocks, scale)  # type: ignore[no-untyped-call]  # torch's
    return out


class _SegmentAttention(torch.autograd.Function):
    """Attention of each query over the blocks that it sees.

    With the log-sum-exp and the output of all its blocks, the gradient of one block is that of a flash kernel on
    the block alone. Query heads of one group are passed as heads, groups as the batch, so keys are never repeated.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[AttentionBlock], scale: float
    ) -> Tensor:
        groups = key.shape[1]
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        log_sum_exp = query.new_zeros((groups, query.shape[1] // groups, query.shape[0]), dtype=torch.float32)
        q, o = _by_group(query, groups), _by_group(out, groups)
        k, v = (_by_group(part, groups).expand(-1, q.shape[1], -1, -1) for part in (key, value))
        for block in blocks:
            here, keys = slice(block.query_start, block.query_end), slice(block.key_start, block.key_end)
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, here], k[:, :, keys], v[:, :, keys], 0.0, block.causal, scale=scale
            )
            if block.causal:  # the first block of its queries
                o[:, :, here], log_sum_exp[:, :, here] = part, part_lse
            else:
                joined = torch.logaddexp(log_sum_exp[:, :, here], part_lse)
                # Both shares from the log-sum-exps: 1 - share would lose the digits of a small one.
                before = torch.exp(log_sum_exp[:, :, here] - joined)[..., None]
                o[:, :, here].mul_(before).add_(part * torch.exp(part_lse - joined)[..., None])
                log_sum_exp[:, :, here] = joined
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, log_sum_exp = ctx.saved_tensors
        groups = key.shape[1]
        totals = [torch.zeros_like(each, memory_format=torch.contiguous_format) for each in (query, key, value)]
        grad, q, o = (_by_group(each, groups) for each in (gradients[0], query, out))
        k, v = (_by_group(part, groups).expand(-1, q.shape[1], -1, -1) for part in (key, value))
        total_q, total_k, total_v = (_by_group(each, groups) for each in totals)
        for block in ctx.blocks:
            here, keys = slice(block.query_start, block.query_end), slice(block.key_start, block.key_end)
            for_q, for_k, for_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, here],
                q[:, :, here],
                k[:, :, keys],
                v[:, :, keys],
                o[:, :, here],
                log_sum_exp[:, :, here],
                0.0,
                block.causal,
                scale=ctx.scale,
            )
            total_q[:, :, here] += for_q
            total_k[:, :, keys] += for_k.sum(dim=1, keepdim=True)
            total_v[:, :, keys] += for_v.sum(dim=1, keepdim=True)
        return totals[0], totals[1], totals[2], None, None


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """[s, heads, d] seen as [groups, heads of a group, s, d]."""
    length, heads, size = tensor.shape
    return tensor.view(length, groups, heads // groups, size).permute(1, 2, 0, 3)


def engine_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scale: float, window: int | None
) -> Tensor:
    """Transformer Engine's attention; rows that it cannot express (a scored prompt with two responses) go to `flex`."""
    attend = thd_attention if fits(layout) else flex_attention
    return attend(query, key, value, layout, scale, window)


BACKENDS: dict[str, PackedAttention] = {
    "segments": segment_attention,
    "flex": flex_attention,
    "thd": engine_attention,
    "dense": dense_attention,
}
