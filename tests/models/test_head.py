"""The head against torch.log_softmax, with a padded vocabulary, split over TP or not, in one tile or many."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tspin.config import ParallelSection
from megatron_tspin.models import head
from megatron_tspin.models.head import LogitsRule, ResponseTargets, VocabularyShard, sequence_log_probs, shard_logits
from megatron_tspin.models.linears import PackedWeight
from tests.rank_pool import in_layout

HIDDEN, POSITIONS, PADDED = 16, 14, 128
ALONE: Any = SimpleNamespace(size=lambda: 1)
"""Stands for the process group of a rank without others."""
# The last prompt position predicts the first token of each response, so positions repeat; 11 to 13 predict nothing.
REPEATED = [4, 0, 1, 2, 4, 5, 6, 4, 7, 8, 9, 10, 3, 10]


def inputs(vocab_size: int, own: bool = True) -> tuple[torch.Tensor, torch.Tensor, ResponseTargets, torch.Tensor]:
    """Hidden states, the whole padded output matrix, targets, and the gradient that arrives.

    With `own` every token is a response of its own, otherwise there are five, the third of which has no tokens.
    """
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    # A head that let padding into the softmax would be far off.
    weight[vocab_size:] = 5.0
    positions = torch.tensor(REPEATED)
    tokens = torch.randint(0, vocab_size, positions.shape, generator=generator)
    tokens[0], tokens[1] = 0, vocab_size - 1
    best = (hidden[positions] @ weight[:vocab_size].t()).argmax(dim=1)
    tokens[5:8] = best[5:8]
    owners = torch.arange(len(REPEATED)) if own else torch.tensor([0, 0, 0, 0, 1, 1, 1, 3, 3, 3, 3, 3, 3, 4])
    count = len(REPEATED) if own else 5
    return hidden, weight, ResponseTargets(positions, tokens, owners, count), torch.randn(count, generator=generator)


def shard_of(rank: int, tp: int, vocab_size: int, group: Any) -> VocabularyShard:
    size = PADDED // tp
    return VocabularyShard(rank * size, size, min(max(vocab_size - rank * size, 0), size), group)


def on_ranks(tp: int, vocab_size: int, dtype: torch.dtype, own: bool, tile: tuple[int, int] | None) -> Any:
    """Log-probs, this rank's share of the gradient of the hidden states, and the gradient of its rows."""
    from unittest.mock import patch

    with in_layout(ParallelSection(tensor_model_parallel_size=tp)) as topology:
        hidden, weight, targets, gradient = inputs(vocab_size, own)
        shard = shard_of(topology.tp_rank, tp, vocab_size, topology.tp_group)
        hidden = hidden.to(dtype).requires_grad_()
        rows = weight[shard.first : shard.first + shard.size].clone().to(dtype).requires_grad_()
        with patch.object(head, "_CPU_TILE", tile or head._CPU_TILE):
            log_probs = sequence_log_probs(hidden, rows, targets, shard)
            log_probs.backward(gradient)
        assert hidden.grad is not None and rows.grad is not None
        assert hidden.grad.dtype == rows.grad.dtype == dtype
        return log_probs.detach().numpy(), hidden.grad.float().numpy(), rows.grad.float().numpy()


def judge(vocab_size: int, dtype: torch.dtype, own: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight, targets, gradient = inputs(vocab_size, own)
    hidden, weight = (value.to(dtype).double().requires_grad_() for value in (hidden, weight))
    logits = hidden[targets.positions] @ weight[:vocab_size].t()
    by_token = torch.log_softmax(logits, dim=-1).gather(1, targets.token_ids[:, None])[:, 0]
    log_probs = torch.zeros(targets.num_responses, dtype=torch.float64)
    log_probs = log_probs.index_add(0, targets.response_index, by_token)
    log_probs.backward(gradient.double())
    assert hidden.grad is not None and weight.grad is not None
    return log_probs.detach(), hidden.grad, weight.grad


def assert_right(found: Any, vocab_size: int, dtype: torch.dtype, own: bool) -> None:
    expected, hidden_gradient, weight_gradient = judge(vocab_size, dtype, own)
    # In bf16 too the products are summed in fp32; in fp32 they are summed in float64.
    precision = 5e-7 if dtype == torch.float32 else 2e-6
    for log_probs, _, _ in found:
        assert log_probs.dtype == "float32"
        assert torch.allclose(torch.from_numpy(log_probs).double(), expected, rtol=precision, atol=precision)
        assert (log_probs == found[0][0]).all(), "TP ranks have to agree to the bit"
    precision = 3e-6 if dtype == torch.float32 else 5e-3  # of the largest entry
    summed = sum(torch.from_numpy(share) for _, share, _ in found).double()
    assert (summed - hidden_gradient).abs().max() < precision * hidden_gradient.abs().max()
    assert not summed[11:].any(), "a position that predicts nothing has a gradient"
    rows = torch.cat([torch.from_numpy(part) for _, _, part in found]).double()
    assert (rows - weight_gradient).abs().max() < precision * weight_gradient.abs().max()
    assert not rows[vocab_size:].any(), "padding learns"
    assert rows[:vocab_size].any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", [101, 128, 60], ids=["padded", "full", "a rank with padding only"])
@pytest.mark.parametrize("tp", [1, 2])
def test_value_and_gradient(tp: int, vocab_size: int, dtype: torch.dtype, ranks: Any) -> None:
    assert_right(ranks(tp).run(on_ranks, tp, vocab_size, dtype, True, None), vocab_size, dtype, True)


@pytest.mark.parametrize("tile", [(1, 1), (4, 16), (5, 200), (200, 7)], ids=str)
@pytest.mark.parametrize("tp", [1, 2])
def test_tiles_change_nothing(tp: int, tile: tuple[int, int], ranks: Any) -> None:
    """Tiles that divide nothing, of one logit, of all positions, of all rows."""
    found = ranks(tp).run(on_ranks, tp, 101, torch.float32, False, tile)
    assert_right(found, 101, torch.float32, False)


def alone(vocab_size: int, diagnostics: bool = False, own: bool = False, **facts: Any) -> Any:
    """Inputs for this process: hidden states, weight, targets, shard, gradient; `facts` replace targets' fields."""
    from dataclasses import replace

    hidden, weight, targets, gradient = inputs(vocab_size, own)
    targets = replace(targets, diagnostics=diagnostics, **facts)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, shard_of(0, 1, vocab_size, ALONE), gradient


def test_a_response_without_tokens_has_log_prob_0() -> None:
    hidden, weight, targets, shard, _ = alone(101)
    log_probs = sequence_log_probs(hidden, weight, targets, shard)
    assert log_probs.shape == (5,) and log_probs[2] == 0 and (log_probs[[0, 1, 3, 4]] < 0).all()


def nothing_to_predict(tp: int, diagnostics: bool) -> Any:
    with in_layout(ParallelSection(tensor_model_parallel_size=tp)) as topology:
        hidden, weight, _, _ = inputs(101)
        shard = shard_of(topology.tp_rank, tp, 101, topology.tp_group)
        rows = weight[shard.first : shard.first + shard.size].clone().requires_grad_()
        none = torch.zeros(0, dtype=torch.int64)
        found = sequence_log_probs(
            hidden.requires_grad_(), rows, ResponseTargets(none, none, none, 2, diagnostics), shard
        )
        found.sum().backward()
        return found.tolist(), [bool(each.grad.any()) for each in (hidden, rows)]


@pytest.mark.parametrize("diagnostics", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_rank_without_anything_to_predict(tp: int, diagnostics: bool, ranks: Any) -> None:
    """All tokens of a row's responses may lie on other CP ranks."""
    zeros = [[0.0, 0.0]] * 3 if diagnostics else [0.0, 0.0]
    assert ranks(tp).run(nothing_to_predict, tp, diagnostics) == [(zeros, [False, False])] * tp


def test_sums_do_not_lose_digits() -> None:
    """A response's log-prob is the rounded sum of its tokens' fp32 log-probs, not a sum of roundings."""
    many = {"positions": torch.arange(5000) % 11, "token_ids": torch.arange(5000) % 101, "num_responses": 5000}
    hidden, weight, one_each, shard, _ = alone(101, response_index=torch.arange(5000), **many)
    by_token = sequence_log_probs(hidden, weight, one_each, shard)
    _, _, together, _, _ = alone(101, response_index=torch.zeros(5000, dtype=torch.int64), **many)
    total = sequence_log_probs(hidden, weight, together, shard)[0].item()
    assert total == by_token.double().sum().float().item()


def gradients(weight_is_shared: bool, main_grad: torch.Tensor | None) -> Any:
    hidden, weight, targets, shard, gradient = alone(101)
    if main_grad is not None:
        weight.main_grad = main_grad
        weight.grad_added_to_main_grad = False
    sequence_log_probs(hidden, weight, targets, shard, weight_is_shared).backward(gradient)
    return hidden.grad, weight


@pytest.mark.parametrize("weight_is_shared", [False, True])
def test_the_weights_gradient_goes_to_its_buffer(weight_is_shared: bool) -> None:
    """Added there; megatron-core's hook on the parameter fires once, whoever else has a gradient for it."""
    expected, plain = gradients(weight_is_shared, None)
    assert plain.grad is not None and plain.grad.any()
    buffer = torch.full((PADDED, HIDDEN), 0.5)
    found, weight = gradients(weight_is_shared, buffer)
    assert found.equal(expected)
    assert torch.allclose(buffer - 0.5, plain.grad, atol=1e-6)
    assert weight.grad_added_to_main_grad is not weight_is_shared
    assert (weight.grad is None) == weight_is_shared


def diagnosed(tp: int, vocab_size: int, tile: tuple[int, int]) -> Any:
    from dataclasses import replace
    from unittest.mock import patch

    with in_layout(ParallelSection(tensor_model_parallel_size=tp)) as topology:
        hidden, weight, targets, gradient = inputs(vocab_size, own=False)
        shard = shard_of(topology.tp_rank, tp, vocab_size, topology.tp_group)
        rows = weight[shard.first : shard.first + shard.size]
        results = []
        for diagnostics in (False, True):
            states = hidden.clone().requires_grad_()
            with patch.object(head, "_CPU_TILE", tile):
                found = sequence_log_probs(states, rows, replace(targets, diagnostics=diagnostics), shard)
                # What comes back for entropy and top-1 must go nowhere.
                found.backward(gradient.expand(3, -1) if diagnostics else gradient)
            results.append((found.detach().numpy(), states.grad.numpy()))
        return results


@pytest.mark.parametrize("tile", [(512, 1024), (4, 16)], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("vocab_size", [101, 60], ids=["padded", "a rank with padding only"])
@pytest.mark.parametrize("tp", [1, 2])
def test_diagnostics(tp: int, vocab_size: int, tile: tuple[int, int], ranks: Any) -> None:
    hidden, weight, targets, _ = inputs(vocab_size, own=False)
    logits = (hidden.double() @ weight[:vocab_size].double().t())[targets.positions]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    is_top = (logits.argmax(dim=1) == targets.token_ids).double()
    assert 0 < is_top.sum() < len(is_top)
    expected = [torch.zeros(5).double().index_add(0, targets.response_index, each) for each in (entropy, is_top)]
    for plain, (values, gradient) in ranks(tp).run(diagnosed, tp, vocab_size, tile):
        assert values.shape == (3, 5)
        assert (values[0] == plain[0]).all() and (gradient == plain[1]).all(), "measuring changes what is trained"
        assert torch.allclose(torch.from_numpy(values[1]).double(), expected[0], rtol=1e-5, atol=1e-5)
        assert values[2].tolist() == expected[1].tolist()


class LargestOutput(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return out


def largest_output(compute: Any, dtype: torch.dtype, tokens: int, vocab_size: int, width: int) -> int:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (tokens, vocab_size))
    ids = torch.randint(0, vocab_size, (tokens,), generator=generator)
    weight.main_grad = torch.zeros(vocab_size, width)
    targets = ResponseTargets(torch.arange(tokens), ids, torch.arange(tokens) % 3, 3)
    shard = VocabularyShard(0, vocab_size, vocab_size, ALONE)
    with LargestOutput() as largest:
        compute(hidden.requires_grad_(), weight.requires_grad_(), targets, shard).sum().backward()
    return largest.elements


def plain_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: ResponseTargets, _: VocabularyShard
) -> torch.Tensor:
    logits = hidden[targets.positions].float() @ weight.float().t()
    return torch.log_softmax(logits, dim=-1).gather(1, targets.token_ids[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("diagnostics", [False, True])
def test_logits_of_all_tokens_never_exist(diagnostics: bool, dtype: torch.dtype) -> None:
    """Nothing that forward or backward makes is larger than a tile."""
    from dataclasses import replace

    def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: ResponseTargets, shard: Any) -> torch.Tensor:
        return sequence_log_probs(hidden, weight, replace(targets, diagnostics=diagnostics), shard)

    tokens, vocab_size, width = 600, 20_000, 4
    tile = head._CPU_TILE[0] * head._CPU_TILE[1]
    assert tokens * vocab_size > 20 * tile, "far above a tile"
    assert largest_output(ours, dtype, tokens, vocab_size, width) <= tile
    assert largest_output(plain_log_probs, dtype, tokens, vocab_size, width) >= tokens * vocab_size


@pytest.mark.parametrize("rule", [LogitsRule(), LogitsRule(scale=0.5, cap=3.0)])
@torch.no_grad()
def test_logits_for_sampling(rule: LogitsRule) -> None:
    hidden, weight, _, _ = inputs(101)
    expected = rule.apply(hidden @ weight.t())
    for packed in (None, PackedWeight(weight)):
        assert torch.allclose(shard_logits(hidden, weight, rule, packed), expected, rtol=1e-5, atol=1e-5)


def test_extreme_logits() -> None:
    """Differences of thousands between logits neither overflow nor lose the gradient."""
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [9.0]])
    targets = ResponseTargets(torch.arange(2), torch.tensor([1, 0]), torch.arange(2), 2, diagnostics=True)
    found = sequence_log_probs(hidden, weight, targets, VocabularyShard(0, 3, 2, ALONE))
    assert found.tolist() == [[-2e4, -2e4], [0.0, 0.0], [0.0, 0.0]]
    found[0].sum().backward()
    assert hidden.grad is not None and hidden.grad.tolist() == [[-2.0], [2.0]]
