"""The learning-rate schedule."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tspin.config import OptimizerSection
from megatron_tspin.training.learning_rate import learning_rate


def schedule(num_steps: int, **settings: object) -> list[float]:
    section = OptimizerSection(lr=1.0, **settings)  # type: ignore[arg-type]
    return [learning_rate(step, num_steps, 1.0, section) for step in range(num_steps)]


def test_warm_up_then_linear() -> None:
    assert schedule(10, lr_warmup_fraction=0.2, min_lr=0.2) == pytest.approx(
        [0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    )


def test_cosine() -> None:
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert schedule(4, lr_warmup_fraction=0.0, min_lr=0.1, lr_decay_style="cosine") == pytest.approx(expected)


def test_constant() -> None:
    assert schedule(4, lr_warmup_fraction=0.5, lr_decay_style="constant", min_lr=0.1) == [0.5, 1.0, 1.0, 1.0]


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert schedule(2, lr_warmup_fraction=0.0) == [1.0, 0.5]


@pytest.mark.parametrize("style", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.99])
def test_a_single_step_is_at_the_peak(style: str, fraction: float) -> None:
    assert schedule(1, lr_decay_style=style, lr_warmup_fraction=fraction) == [1.0]


@pytest.mark.parametrize(("num_steps", "warmup"), [(10, 1), (11, 2), (30, 3), (70, 7), (140, 14)])
def test_a_tenth_of_the_steps_warms_up(num_steps: int, warmup: int) -> None:
    """0.1 * 70 is a little more than 7 in floating point."""
    rates = schedule(num_steps, lr_warmup_fraction=0.1)
    assert rates[warmup - 1] == 1.0 and rates[warmup - 1] > rates[warmup + 1]
    assert all(rate < 1.0 for rate in rates[: warmup - 1])


@given(
    num_steps=st.integers(1, 60),
    fraction=st.floats(0, 0.99),
    least=st.floats(0, 1),
    style=st.sampled_from(["linear", "cosine", "constant"]),
)
def test_it_rises_and_then_never_does(num_steps: int, fraction: float, least: float, style: str) -> None:
    rates = schedule(num_steps, lr_warmup_fraction=fraction, min_lr=least, lr_decay_style=style)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert all(a >= b - 1e-12 for a, b in zip(rates[top:], rates[top + 1 :], strict=False))
    assert 0 < max(rates) <= 1.0 and rates[-1] >= least * 0.999 or num_steps * fraction > num_steps - 1
