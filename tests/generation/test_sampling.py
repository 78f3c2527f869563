"""Tokens are drawn from the distribution that was asked for, with randomness that its key decides."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_tspin.config import ParallelSection
from megatron_tspin.generation.sampling import Decoding, answer_seed, choose, uniforms
from megatron_tspin.models.head import VocabularyShard
from tests.rank_pool import in_layout


def decoding(**settings: float) -> Decoding:
    return Decoding(**{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 8, **settings})


WHOLE = VocabularyShard(0, 6, 6, SimpleNamespace(size=lambda: 1))


def whole(size: int) -> VocabularyShard:
    return replace(WHOLE, size=size, valid=size)


def test_the_key_decides() -> None:
    values = uniforms(answer_seed(3, "synthetic/0", "a"), 5)
    assert values.tolist() == uniforms(answer_seed(3, "synthetic/0", "a"), 9)[:5].tolist()
    others = [(4, "synthetic/0", "a"), (3, "synthetic/1", "a"), (3, "synthetic/0", "b"), (3, "synthetic/0", "a", 1)]
    assert all((uniforms(answer_seed(*other), 5) != values).all() for other in others)


def test_the_stream_is_pinned() -> None:
    """A run that is continued under a newer numpy has to go on with the same numbers."""
    assert uniforms(answer_seed(1, "synthetic/0", "17"), 2).tolist() == [0.12547587732415344, 0.24377992983489094]


def test_uniforms_are_uniform() -> None:
    values = np.concatenate([uniforms(answer_seed(0, "p", str(i)), 50) for i in range(400)])
    histogram = np.histogram(values, bins=10, range=(0, 1))[0]
    assert abs(histogram / len(values) - 0.1).max() < 0.01


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}], ids=str)
def test_frequencies(settings: dict[str, float]) -> None:
    logits = torch.tensor([1.5, 0.2, -0.5, 1.0, -2.0, 0.0])
    chosen_decoding = decoding(**settings)
    expected = torch.softmax(logits.double() / chosen_decoding.temperature, -1)
    order = expected.argsort(descending=True)
    if chosen_decoding.top_k:
        expected[order[chosen_decoding.top_k :]] = 0
    if chosen_decoding.top_p < 1:
        before = expected[order].cumsum(0) - expected[order]
        expected[order[before >= chosen_decoding.top_p]] = 0
    expected /= expected.sum()
    count = 20000
    numbers = torch.from_numpy(uniforms(answer_seed(5, "f", "x"), count))
    ids, log_probs = choose(logits.expand(count, -1), numbers, chosen_decoding, WHOLE)
    frequencies = torch.bincount(ids, minlength=6) / count
    assert (frequencies - expected).abs().max() < 0.012
    assert ((expected == 0) <= (frequencies == 0)).all()
    assert torch.allclose(log_probs, torch.log_softmax(logits.double(), -1)[ids], rtol=0, atol=1e-6)


@given(uniform=st.floats(0, 1, exclude_max=True), rows=st.integers(1, 3))
def test_a_token_without_probability_is_never_chosen(uniform: float, rows: int) -> None:
    logits = torch.full((rows, 5), -torch.inf)
    logits[:, 1] = 0.0
    logits[:, 3] = 0.3
    ids, _ = choose(logits, torch.full((rows,), uniform, dtype=torch.float64), decoding(), whole(5))
    assert set(ids.tolist()) <= {1, 3}


VOCABULARY, ROWS = 1300, 40


def random_logits() -> tuple[Tensor, Tensor]:
    """Flat rows, peaked ones, and one with a tie at its top."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(ROWS, VOCABULARY, generator=generator) * torch.linspace(0.1, 6, ROWS)[:, None]
    logits[7, [3, 1290]] = logits[7].max() + 1
    return logits, torch.rand(ROWS, generator=generator, dtype=torch.float64)


def written_out(logits: Tensor, numbers: Tensor, how: Decoding) -> list[int]:
    """One row after the other, over the whole vocabulary."""
    chosen = []
    for row, number in zip(logits.double(), numbers, strict=True):
        if how.temperature == 0:
            chosen.append(int(row.argmax()))
            continue
        scaled = row / how.temperature
        if how.top_k:
            scaled = scaled.masked_fill(scaled < scaled.sort(descending=True).values[how.top_k - 1], -torch.inf)
        probabilities = scaled.softmax(-1)
        ordered = probabilities.sort(descending=True).values
        smallest = ordered[int((ordered.cumsum(0) - ordered < how.top_p).sum()) - 1]
        cumulative = probabilities.masked_fill(probabilities < smallest, 0.0).cumsum(0)
        chosen.append(int((cumulative > number * cumulative[-1]).int().argmax()))
    return chosen


def choose_on_shards(tp: int, settings: dict[str, float]) -> Any:
    """On ranks: what is chosen where the last rank holds fewer tokens, or none."""
    logits, numbers = random_logits()
    with in_layout(ParallelSection(tensor_model_parallel_size=tp)) as topology:
        bounds = {1: [0, VOCABULARY], 2: [0, 900, VOCABULARY]}[tp]
        parts = []
        for ends in (bounds, [0, *[VOCABULARY] * tp]):
            first, end = ends[topology.tp_rank : topology.tp_rank + 2]
            shard = VocabularyShard(first, 1400, end - first, topology.tp_group)
            parts.append([each.tolist() for each in choose(logits[:, first:end], numbers, decoding(**settings), shard)])
        return parts


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"top_k": 30},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"top_k": 1000, "top_p": 0.95, "temperature": 1.5},
    ],
    ids=str,
)
def test_any_division_of_the_vocabulary_chooses_the_same(settings: dict[str, float], tp: int, ranks: Any) -> None:
    logits, numbers = random_logits()
    expected = written_out(logits, numbers, decoding(**settings))
    log_probs = torch.log_softmax(logits.double(), -1)[torch.arange(ROWS), torch.tensor(expected)]
    for parts in ranks(tp).run(choose_on_shards, tp, settings):
        for ids, found in parts:
            assert ids == expected
            assert torch.allclose(torch.tensor(found, dtype=torch.float64), log_probs, rtol=0, atol=1e-5)
