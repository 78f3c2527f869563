"""The statistics of `precision.json`, against sums by hand."""

import numpy as np
import pytest

from megatron_tspin.training.precision_noise import differences, margin_noise, share


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def test_differences_by_hand() -> None:
    found = differences(array(-9.0, -22.0, -30.0, -3.5), array(-10, -20, -30, -4), array(4, 9, 2, 10), list("abcd"))
    assert found.count == 4
    assert found.mean == pytest.approx((1 - 2 + 0 + 0.5) / 4)
    assert found.mean_absolute == pytest.approx(3.5 / 4)
    assert found.standard_deviation == pytest.approx(((1 + 4 + 0.25) / 4 - 0.125**2) ** 0.5)
    assert found.p95_absolute == pytest.approx(1 + 0.85 * (2 - 1))
    assert (found.largest_absolute, found.largest_id) == (2.0, "b")
    assert found.per_token_rms == pytest.approx((5.25 / 25) ** 0.5)


def test_the_error_of_a_token_is_recovered_from_sums_of_any_length() -> None:
    chance = np.random.default_rng(0)
    tokens = chance.integers(1, 400, size=4000).astype(np.float64)
    sums = array(*(chance.normal(0, 0.02, size=int(count)).sum() for count in tokens))
    found = differences(sums, np.zeros(4000), tokens, [""] * 4000)
    assert found.per_token_rms == pytest.approx(0.02, rel=0.03)


def test_noise_of_margins_beside_their_size() -> None:
    noise = margin_noise(array(0.4, -0.9, 0.0), array(0.4, -1.0, 0.1), array(9, 9, 9), list("abc"))
    assert noise.median_absolute == pytest.approx(0.4)
    assert noise.noise.mean_absolute == pytest.approx(0.2 / 3)
    assert noise.noise.mean == pytest.approx(0.0)
    assert noise.noise_share == pytest.approx(0.2 / 3 / 0.4)
    assert noise.noise.per_token_rms == pytest.approx((2 * 0.01 / 27) ** 0.5)


def test_there_is_no_share_of_a_margin_of_zero() -> None:
    assert share(0.5, 0.0) is None and share(0.5, 2.0) == 0.25
