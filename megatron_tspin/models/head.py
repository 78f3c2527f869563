"""The head: hidden states to log-probs of responses, over a vocabulary that is split across TP.

Only positions that predict a response token meet the output matrix, tile by tile: a tile is some positions times some
rows of the vocabulary, is reduced to a running log-sum-exp and forgotten. Backward computes it again. No tensor of
[tokens, vocabulary] ever exists. Rows of the padded vocabulary are left out: they take no part in the softmax.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tspin.models.autograd import already_added, run
from megatron_tspin.models.linears import PackedWeight

# Positions and vocabulary rows of a tile. On a CPU it has to stay in the cache (2 MiB in fp32), on a GPU it has to fill
# the device (512 MiB); measured by `benchmarks/triplet_step.py`.
_CPU_TILE = (512, 1024)
_CUDA_TILE = (4096, 32768)


@dataclass(frozen=True)
class ResponseTargets:
    """Which positions predict which response token; the interface between a layout of rows and the head.

    Attributes:
        positions: int64 [n], flat indices into hidden states [s, b, h] seen as [s * b, h]; may repeat.
        token_ids: int64 [n], the token that each position predicts.
        response_index: int64 [n], the response that the token belongs to.
        num_responses: Number of responses in the micro-batch.
        diagnostics: Also wanted: the entropy and the top-1 agreement of each response.
    """

    positions: Tensor
    token_ids: Tensor
    response_index: Tensor
    num_responses: int
    diagnostics: bool = False

    def to(self, device: torch.device) -> "ResponseTargets":
        """The same on another device."""
        return ResponseTargets(
            self.positions.to(device, non_blocking=True),
            self.token_ids.to(device, non_blocking=True),
            self.response_index.to(device, non_blocking=True),
            self.num_responses,
            self.diagnostics,
        )


@dataclass(frozen=True)
class LogitsRule:
    """From the products of hidden states and output matrix to logits: the one place for scales and soft caps."""

    scale: float = 1.0
    cap: float | None = None
    """Logits become cap * tanh(logit / cap)."""

    def apply(self, products: Tensor) -> Tensor:
        """Logits, in the products' memory."""
        if self.scale != 1.0:
            products = products.mul_(self.scale)
        if self.cap is not None:
            products = products.div_(self.cap).tanh_().mul_(self.cap)
        return products

    def times_slope(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient of the products, in the memory of the logits' gradient."""
        if self.scale != 1.0:
            gradient = gradient.mul_(self.scale)
        if self.cap is not None:
            gradient = gradient.mul_(1.0 - (logits / self.cap).square_())
        return gradient


PLAIN = LogitsRule()


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


def sequence_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: ResponseTargets,
    shard: VocabularyShard,
    weight_is_shared: bool = False,
    rule: LogitsRule = PLAIN,
) -> Tensor:
    """Log-prob of each response: the sum over its tokens, in fp32.

    Args:
        hidden: [positions, h], the same on every TP rank; its gradient is this rank's share, to be summed over TP.
        weight: [shard.size, h], this rank's rows of the output matrix. Where it has a `main_grad` (megatron-core's
            fp32 gradient buffer) its gradient goes straight there.
        targets: The response tokens.
        shard: Where the rows belong.
        weight_is_shared: Another module of this rank (the embedding) hands autograd a gradient of the same weight.
        rule: Makes logits.

    Returns:
        fp32 [num_responses], the same on every TP rank. With `targets.diagnostics` [3, num_responses]: log-probs, and
        without gradient the entropy in nats and the number of tokens that are the most probable one, both summed
        over the response's tokens.
    """
    return run(_SequenceLogProbs, hidden, weight, targets, shard, weight_is_shared, rule)


class _SequenceLogProbs(torch.autograd.Function):
    """Linear, log-softmax at the targets and the sum per response, as one differentiable step."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: ResponseTargets,
        shard: VocabularyShard,
        weight_is_shared: bool,
        rule: LogitsRule,
    ) -> Tensor:
        statistics = _token_statistics(hidden, weight, targets, shard, rule)
        ctx.save_for_backward(hidden, weight, statistics.log_sum_exp.float())
        ctx.targets, ctx.shard, ctx.weight_is_shared, ctx.rule = targets, shard, weight_is_shared, rule
        rows = [statistics.target - statistics.log_sum_exp]
        if targets.diagnostics:
            is_top = statistics.target >= statistics.largest
            rows += [statistics.log_sum_exp - statistics.mean_logit, is_top.double()]
        sums = hidden.new_zeros((len(rows), targets.num_responses), dtype=torch.float64)
        sums.index_add_(1, targets.response_index, torch.stack(rows))
        return sums.float() if targets.diagnostics else sums[0].float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        hidden, weight, log_sum_exp = ctx.saved_tensors
        targets: ResponseTargets = ctx.targets
        by_response = gradients[0][0] if targets.diagnostics else gradients[0]
        slope = by_response.index_select(0, targets.response_index)
        main_grad: Tensor | None = getattr(weight, "main_grad", None)
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if main_grad is None else main_grad
        hidden_gradient = _accumulate_gradients(
            hidden, weight, targets, ctx.shard, ctx.rule, log_sum_exp, slope, weight_gradient
        )
        if main_grad is None:
            return hidden_gradient, weight_gradient.to(weight.dtype), None, None, None, None
        if ctx.weight_is_shared:
            return hidden_gradient, None, None, None, None, None
        return hidden_gradient, already_added(weight), None, None, None, None


@dataclass
class _TokenStatistics:
    """Per position, float64 [n]."""

    log_sum_exp: Tensor
    target: Tensor
    """Logit of the token that is predicted."""
    mean_logit: Tensor
    """Sum of probability times logit; only with diagnostics."""
    largest: Tensor


def _token_statistics(
    hidden: Tensor, weight: Tensor, targets: ResponseTargets, shard: VocabularyShard, rule: LogitsRule
) -> _TokenStatistics:
    """Runs over the tiles of this shard, then joins the shards with one MAX and one SUM."""
    positions_per_tile, _ = _tile(hidden)
    parts = [
        _local_statistics(
            hidden.index_select(0, targets.positions[start : start + positions_per_tile]),
            weight,
            targets.token_ids[start : start + positions_per_tile] - shard.first,
            shard.valid,
            targets.diagnostics,
            rule,
        )
        for start in range(0, len(targets.positions), positions_per_tile)
    ]
    local = torch.cat(parts, dim=1) if parts else hidden.new_zeros((4, 0), dtype=torch.float64)
    return _join_shards(local, shard, targets.diagnostics)


def _local_statistics(
    hidden: Tensor, weight: Tensor, local_ids: Tensor, valid: int, diagnostics: bool, rule: LogitsRule
) -> Tensor:
    """Over this shard's real tokens, float64 [4, n]: largest logit, sum of exponentials, target logit, mean numerator.

    Exponentials are relative to the largest logit; the target's logit is 0 where another shard holds the target; the
    numerator is the sum of exponentials times logits.
    """
    # A running fp32 log-sum-exp would be rounded once a tile, to the last digit of a number around 20.
    found = hidden.new_zeros((4, hidden.shape[0]), dtype=torch.float64)
    largest, total, target, numerator = found
    largest.fill_(-torch.inf)
    _, rows_per_tile = _tile(hidden)
    for first in range(0, valid, rows_per_tile):
        rows = weight[first : min(first + rows_per_tile, valid)]
        logits = rule.apply(_products(hidden, rows))
        place = local_ids - first
        inside = (place >= 0) & (place < rows.shape[0])
        at_target = logits.gather(1, place.clamp(0, rows.shape[0] - 1)[:, None])[:, 0]
        target += torch.where(inside, at_target, 0.0)
        top = logits.amax(dim=1)
        new = torch.maximum(largest, top.double())
        before, here = torch.exp(largest - new), torch.exp(top.double() - new)
        exponentials = (logits - top[:, None]).exp_()
        total.mul_(before).add_(here * exponentials.sum(dim=1))
        if diagnostics:
            numerator.mul_(before).add_(here * exponentials.mul_(logits).sum(dim=1))
        largest.copy_(new)
    return found


def _join_shards(local: Tensor, shard: VocabularyShard, diagnostics: bool) -> _TokenStatistics:
    largest, total, target, numerator = local
    if shard.split():
        overall = largest.clone()
        dist.all_reduce(overall, op=dist.ReduceOp.MAX, group=shard.group)
        share = torch.exp(largest - overall)
        sums = torch.stack((share * total, target, *((share * numerator,) if diagnostics else ())))
        dist.all_reduce(sums, group=shard.group)
        largest, total, target = overall, sums[0], sums[1]
        numerator = sums[2] if diagnostics else numerator
    return _TokenStatistics(
        log_sum_exp=largest + torch.log(total), target=target, mean_logit=numerator / total, largest=largest
    )


def _accumulate_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: ResponseTargets,
    shard: VocabularyShard,
    rule: LogitsRule,
    log_sum_exp: Tensor,
    slope: Tensor,
    weight_gradient: Tensor,
) -> Tensor:
    """Adds the weight's gradient to `weight_gradient` (fp32); returns that of `hidden`.

    The gradient of a logit is slope * (one-hot - softmax). Here the logits are plain fp32 sums.
    """
    hidden_gradient = torch.zeros_like(hidden, dtype=torch.float32)
    positions_per_tile, rows_per_tile = _tile(hidden)
    for start in range(0, len(targets.positions), positions_per_tile):
        part = slice(start, start + positions_per_tile)
        states = hidden.index_select(0, targets.positions[part])
        place = targets.token_ids[part] - shard.first
        gradient = torch.zeros_like(states, dtype=torch.float32)
        for first in range(0, shard.valid, rows_per_tile):
            rows = slice(first, min(first + rows_per_tile, shard.valid))
            logits = rule.apply(_matmul_fp32(states, weight[rows].t()))
            kept = logits if rule.cap is None else logits.clone()
            tile = logits.sub_(log_sum_exp[part, None]).exp_()
            tile.mul_(-slope[part, None])
            inside = ((place >= rows.start) & (place < rows.stop)).nonzero()[:, 0]
            tile[inside, place[inside] - rows.start] += slope[part][inside]
            tile = rule.times_slope(tile, kept)
            _add_matmul(gradient, tile, weight[rows])
            _add_matmul(weight_gradient[rows], tile.t(), states)
        hidden_gradient.index_add_(0, targets.positions[part], gradient)
    return hidden_gradient.to(hidden.dtype)


def _tile(tensor: Tensor) -> tuple[int, int]:
    return _CUDA_TILE if tensor.is_cuda else _CPU_TILE


def _products(hidden: Tensor, rows: Tensor) -> Tensor:
    """Products fp32 [n, rows] of hidden states and rows of the output matrix.

    In fp32 training each is summed in float64 and rounded once. Its terms cancel (on SmolLM2-135M they sum to 80 in
    magnitude and to 6 in all), so that an fp32 sum would be two thirds of the whole model's rounding error.
    """
    if hidden.dtype == torch.float32:
        return (hidden.double() @ rows.double().t()).float()
    return _matmul_fp32(hidden, rows.t())


def _matmul_fp32(left: Tensor, right: Tensor) -> Tensor:
    """The product of matrices of 16 or 32 bits, summed and returned in fp32."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to `total` in fp32; a GPU multiplies in the 16 bits of `right`, if it has no more."""
    if right.is_cuda and right.dtype != torch.float32:
        total += torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    else:
        total.addmm_(left, right.float())


def shard_logits(
    hidden: Tensor, weight: Tensor, rule: LogitsRule = PLAIN, packed: PackedWeight | None = None
) -> Tensor:
    """Logits fp32 [n, v] of tokens after hidden states [n, h]; without gradient.

    They are plain fp32 sums: what `sequence_log_probs` adds to their precision, sampling has no use for.

    Args:
        hidden: [n, h].
        weight: The tokens' rows of the head, [v, h].
        rule: What the family does to logits.
        packed: The same rows.
    """
    found = packed.product(hidden) if packed is not None else None
    return rule.apply(_matmul_fp32(hidden, weight.t()) if found is None else found)
