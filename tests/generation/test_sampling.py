"""Tokens are drawn from the distribution that was asked for, with randomness that its key decides."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tspin.generation.sampling import Decoding, choose, keyed_uniforms


def decoding(**settings: float) -> Decoding:
    return Decoding(**{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 8, **settings})  # type: ignore[arg-type]


def test_the_key_decides() -> None:
    values = keyed_uniforms(3, "synthetic/0", "a", 5)
    assert values.tolist() == keyed_uniforms(3, "synthetic/0", "a", 9)[:5].tolist()
    others = [(4, "synthetic/0", "a"), (3, "synthetic/1", "a"), (3, "synthetic/0", "b")]
    assert all((keyed_uniforms(*other, 5) != values).all() for other in others)


def test_the_stream_is_pinned() -> None:
    """A run that is continued under a newer numpy has to go on with the same numbers."""
    assert keyed_uniforms(1, "synthetic/0", "17", 2).tolist() == [0.12547587732415344, 0.24377992983489094]


def test_uniforms_are_uniform() -> None:
    values = np.concatenate([keyed_uniforms(0, "p", str(i), 50) for i in range(400)])
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
    uniforms = torch.from_numpy(keyed_uniforms(5, "f", "x", count))
    ids, log_probs = choose(logits.expand(count, -1), uniforms, chosen_decoding)
    frequencies = torch.bincount(ids, minlength=6) / count
    assert (frequencies - expected).abs().max() < 0.012
    assert ((expected == 0) <= (frequencies == 0)).all()
    assert log_probs.equal(torch.log_softmax(logits, -1)[ids])


@given(uniform=st.floats(0, 1, exclude_max=True), rows=st.integers(1, 3))
def test_a_token_without_probability_is_never_chosen(uniform: float, rows: int) -> None:
    logits = torch.full((rows, 5), -torch.inf)
    logits[:, 1] = 0.0
    logits[:, 3] = 0.3
    ids, _ = choose(logits, torch.full((rows,), uniform, dtype=torch.float64), decoding())
    assert set(ids.tolist()) <= {1, 3}
