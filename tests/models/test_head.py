"""The head against torch.log_softmax, with a padded vocabulary, split over TP or not."""

from typing import Any

import pytest
import torch
from rank_pool import in_layout

from megatron_tspin.config import ParallelSection

HIDDEN, POSITIONS, PADDED = 16, 11, 128


def inputs(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, the whole padded output matrix, tokens, and the gradient that arrives."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    # A head that let padding into the softmax would be far off.
    weight[vocab_size:] = 5.0
    tokens = torch.randint(0, vocab_size, (POSITIONS,), generator=generator)
    tokens[0], tokens[1] = 0, vocab_size - 1
    return hidden, weight, tokens, torch.randn(POSITIONS, generator=generator)


def on_ranks(tp: int, vocab_size: int, dtype: torch.dtype) -> Any:
    """Log-probs, this rank's share of the gradient of the hidden states, and the gradient of its rows."""
    from megatron_tspin.models.head import VocabularyShard, token_log_probs

    with in_layout(ParallelSection(tensor_model_parallel_size=tp)) as topology:
        hidden, weight, tokens, gradient = inputs(vocab_size)
        size = PADDED // tp
        first = topology.tp_rank * size
        shard = VocabularyShard(first, size, min(max(vocab_size - first, 0), size), topology.tp_group)
        hidden = hidden.to(dtype).requires_grad_()
        rows = weight[first : first + size].clone().to(dtype).requires_grad_()
        log_probs = token_log_probs(hidden, rows, tokens, shard)
        log_probs.backward(gradient)
        assert hidden.grad is not None and rows.grad is not None
        return log_probs.detach().numpy(), hidden.grad.float().numpy(), rows.grad.float().numpy()


def judge(vocab_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight, tokens, gradient = inputs(vocab_size)
    hidden, weight = (value.to(dtype).double().requires_grad_() for value in (hidden, weight))
    log_probs = torch.log_softmax(hidden @ weight[:vocab_size].t(), dim=-1).gather(1, tokens[:, None])[:, 0]
    log_probs.backward(gradient.double())
    assert hidden.grad is not None and weight.grad is not None
    return log_probs.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", [101, 128, 60], ids=["padded", "full", "a rank with padding only"])
@pytest.mark.parametrize("tp", [1, 2])
def test_value_and_gradient(tp: int, vocab_size: int, dtype: torch.dtype, ranks: Any) -> None:
    found = ranks(tp).run(on_ranks, tp, vocab_size, dtype)
    expected, hidden_gradient, weight_gradient = judge(vocab_size, dtype)
    close = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.06}
    for log_probs, _, _ in found:
        assert log_probs.dtype == "float32"
        assert torch.allclose(torch.from_numpy(log_probs).double(), expected, **close)
        assert (log_probs == found[0][0]).all(), "TP ranks have to agree to the bit"
    summed = sum(torch.from_numpy(share) for _, share, _ in found).double()  # type: ignore[attr-defined]
    assert torch.allclose(summed, hidden_gradient, **close)
    rows = torch.cat([torch.from_numpy(part) for _, _, part in found]).double()
    assert torch.allclose(rows, weight_gradient, **close)
    assert not rows[vocab_size:].any(), "padding learns"
    assert rows[:vocab_size].any(dim=1).all()


def sampling_logits(tp: int) -> Any:
    from megatron_tspin.models.head import VocabularyShard, full_logits

    with in_layout(ParallelSection(tensor_model_parallel_size=tp)) as topology:
        hidden, weight, _, _ = inputs(101)
        size = PADDED // tp
        shard = VocabularyShard(topology.tp_rank * size, size, size, topology.tp_group)
        return full_logits(hidden, weight[shard.first : shard.first + size], shard, 101).numpy()


@pytest.mark.parametrize("tp", [1, 2])
def test_logits_for_sampling_leave_the_padding_out(tp: int, ranks: Any) -> None:
    hidden, weight, _, _ = inputs(101)
    for found in ranks(tp).run(sampling_logits, tp):
        assert found.shape == (POSITIONS, 101)
        assert torch.allclose(torch.from_numpy(found), hidden @ weight[:101].t(), rtol=1e-5, atol=1e-5)


def test_extreme_logits() -> None:
    """Differences of thousands between logits neither overflow nor lose the gradient."""
    from types import SimpleNamespace

    from megatron_tspin.models.head import VocabularyShard, token_log_probs

    group: Any = SimpleNamespace(size=lambda: 1)
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [9.0]])
    log_probs = token_log_probs(hidden, weight, torch.tensor([1, 0]), VocabularyShard(0, 3, 2, group))
    assert log_probs.tolist() == [-2e4, -2e4]
    log_probs.sum().backward()
    assert hidden.grad is not None and hidden.grad.tolist() == [[-2.0], [2.0]]


def test_sums_by_response() -> None:
    from megatron_tspin.models.head import ResponseTargets, sum_by_response

    owner = torch.tensor([0, 0, 2, 2, 2])
    targets = ResponseTargets(torch.arange(5), torch.arange(5), owner, num_responses=4)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert sum_by_response(values, targets).tolist() == [3.0, 0.0, 12.0, 0.0]
