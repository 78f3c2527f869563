"""Attention over a packed row by torch's CPU flash kernel, as `segment_plan` lays the row's bundles out.

Given the log-sum-exp and the output of all that a query sees, the gradient of one part of it is that of the kernel on
the part alone, so nothing is kept but outputs and log-sum-exps, and parts need no mask. In kernel calls key-value heads
are part of the batch and the query heads of each are the heads, so keys are never repeated.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_tspin.models.autograd import run
from megatron_tspin.models.row_layout import AttentionBlock
from megatron_tspin.models.segment_plan import SegmentPlan, SequenceBatch

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_by_plan(query: Tensor, key: Tensor, value: Tensor, plan: SegmentPlan, scale: float) -> Tensor:
    """Each query over what it sees; zeros at padding.

    Args:
        query: [s, heads, d] of this rank.
        key: [t, key groups, d] of the whole row.
        value: [t, key groups, d].
        plan: Of the row, for these heads and key groups.
        scale: Of the scores, before softmax.

    Returns:
        [s, heads, d].
    """
    return run(_SegmentAttention, query, key, value, plan, scale)


class _SegmentAttention(torch.autograd.Function):
    """Batches of sequences first, then the blocks of the bundles that are in none."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: SegmentPlan, scale: float) -> Tensor:
        parts, kept = [], []
        for batch in plan.batches:
            q = _spread(query, batch)
            k, v = (_spread(each, batch).expand_as(q) for each in (key, value))
            part, log_sum_exp = _flash(q, k, v, 0.0, True, scale=scale)
            parts.append(part)
            kept.append(log_sum_exp)
        out = _collect(parts, plan, query)
        if plan.blocks:
            kept.append(_forward_blocks(query, key, value, out, plan.blocks, scale))
        ctx.save_for_backward(query, key, value, out, *kept)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, *kept = ctx.saved_tensors
        plan: SegmentPlan = ctx.plan
        for_key, for_value = (torch.zeros_like(each, memory_format=torch.contiguous_format) for each in (key, value))
        parts = []
        for batch, log_sum_exp in zip(plan.batches, kept, strict=False):  # the blocks' comes last
            q, o, gradient = (_spread(each, batch) for each in (query, out, gradients[0]))
            if batch.owners is not None:
                gradient = gradient * batch.owners
            k, v = (_spread(each, batch).expand_as(q) for each in (key, value))
            for_q, for_k, for_v = _flash_backward(gradient, q, k, v, o, log_sum_exp, 0.0, True, scale=ctx.scale)
            parts.append(for_q)
            _add_spread(for_key, for_k, batch)
            _add_spread(for_value, for_v, batch)
        for_query = _collect(parts, plan, query)
        if plan.blocks:
            given, totals = (gradients[0], query, key, value, out), (for_query, for_key, for_value)
            _backward_blocks(given, totals, kept[-1], plan.blocks, ctx.scale)
        return for_query, for_key, for_value, None, None


def _spread(tensor: Tensor, batch: SequenceBatch) -> Tensor:
    """[s, heads, d] laid out as [key groups x sequences, heads of a key group, L, d]."""
    length, heads, size = tensor.shape
    each = heads // batch.key_groups
    rows = tensor.reshape(length * batch.key_groups, each * size).index_select(0, batch.places)
    return rows.view(-1, batch.length, each, size).transpose(1, 2)


def _collect(parts: Sequence[Tensor], plan: SegmentPlan, like: Tensor) -> Tensor:
    """What came out of the batches at each token, [s, heads, d]; zeros outside them."""
    if not parts:
        return torch.zeros_like(like, memory_format=torch.contiguous_format)
    rows = [part.transpose(1, 2).flatten(2).flatten(0, 1) for part in parts]
    whole = rows[0] if len(rows) == 1 else torch.cat(rows)
    out = whole.index_select(0, plan.source).view(like.shape)
    for start, end in plan.outside:
        out[start:end] = 0.0
    return out


def _add_spread(total: Tensor, part: Tensor, batch: SequenceBatch) -> None:
    """Adds [key groups x sequences, heads of a key group, L, d] to the keys [t, key groups, d] it belongs to."""
    summed = part.sum(dim=1) if part.shape[1] > 1 else part[:, 0]
    rows = total.view(-1, total.shape[2])
    rows.index_add_(0, batch.places, summed.reshape(-1, total.shape[2]))


def _forward_blocks(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, blocks: Sequence[AttentionBlock], scale: float
) -> Tensor:
    """Writes the blocks' output into `out`; returns their log-sum-exp, fp32 [key groups, heads of each, s]."""
    key_groups = key.shape[1]
    log_sum_exp = query.new_zeros((key_groups, query.shape[1] // key_groups, query.shape[0]), dtype=torch.float32)
    q, o = _by_key_group(query, key_groups), _by_key_group(out, key_groups)
    k, v = (_by_key_group(part, key_groups).expand(-1, q.shape[1], -1, -1) for part in (key, value))
    for block in blocks:
        here, keys = slice(block.query_start, block.query_end), slice(block.key_start, block.key_end)
        part, part_lse = _flash(q[:, :, here], k[:, :, keys], v[:, :, keys], 0.0, block.causal, scale=scale)
        if block.causal:  # the first block of its queries
            o[:, :, here], log_sum_exp[:, :, here] = part, part_lse
        else:
            joined = torch.logaddexp(log_sum_exp[:, :, here], part_lse)
            # Both shares from the log-sum-exps: 1 - share would lose the digits of a small one.
            before = torch.exp(log_sum_exp[:, :, here] - joined)[..., None]
            o[:, :, here].mul_(before).add_(part * torch.exp(part_lse - joined)[..., None])
            log_sum_exp[:, :, here] = joined
    return log_sum_exp


def _backward_blocks(
    given: Sequence[Tensor],
    totals: Sequence[Tensor],
    log_sum_exp: Tensor,
    blocks: Sequence[AttentionBlock],
    scale: float,
) -> None:
    """Adds the blocks' gradients to those of query, key and value.

    Args:
        given: The gradient that arrives, query, key, value and output.
        totals: The gradients of query, key and value.
        log_sum_exp: What `_forward_blocks` returned.
        blocks: Of the row.
        scale: Of the scores.
    """
    key_groups = given[2].shape[1]
    gradient, q, k, v, o = (_by_key_group(each, key_groups) for each in given)
    k, v = (each.expand(-1, q.shape[1], -1, -1) for each in (k, v))
    total_q, total_k, total_v = (_by_key_group(each, key_groups) for each in totals)
    for block in blocks:
        here, keys = slice(block.query_start, block.query_end), slice(block.key_start, block.key_end)
        for_q, for_k, for_v = _flash_backward(
            gradient[:, :, here],
            q[:, :, here],
            k[:, :, keys],
            v[:, :, keys],
            o[:, :, here],
            log_sum_exp[:, :, here],
            0.0,
            block.causal,
            scale=scale,
        )
        total_q[:, :, here] += for_q
        total_k[:, :, keys] += for_k.sum(dim=1, keepdim=True)
        total_v[:, :, keys] += for_v.sum(dim=1, keepdim=True)


def _by_key_group(tensor: Tensor, key_groups: int) -> Tensor:
    """[s, heads, d] seen as [key groups, heads of each, s, d]."""
    length, heads, size = tensor.shape
    return tensor.view(length, key_groups, heads // key_groups, size).permute(1, 2, 0, 3)
