"""FP8 matrices against the list of all numbers of the format, and their product against float64."""

import pytest
import torch

from megatron_tspin.models.fp8_quantize import absolute_maximum, matmul_transposed, quantize, transposed

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
ALONG = pytest.mark.parametrize("along", [None, 0, 1])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers whose sizes differ by row, by column and by element."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randn(n, generator=generator).exp() for n in shape)
    return (torch.randn(*shape, generator=generator) * rows[:, None] * columns).to(dtype)


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of the format, ascending, float64."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return every[every.isfinite()].unique()


def nearest(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance from each element to the nearest number of the format."""
    distances: torch.Tensor = (matrix.double()[..., None] - numbers(dtype)).abs().amin(dim=-1)
    return distances


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@ALONG
@FORMATS
def test_the_nearest_number_and_the_whole_range(dtype: torch.dtype, along: int | None, source: torch.dtype) -> None:
    matrix = random(5, 7, dtype=source)
    amax = absolute_maximum(matrix, along)
    assert amax.dtype == torch.float32
    assert amax.shape == {None: (1, 1), 0: (1, 7), 1: (5, 1)}[along]
    found = quantize(matrix, amax, dtype)
    scaled = matrix.double() / found.inverse_scale.double()
    error = (scaled - found.values.double()).abs()
    # The scale is rounded to fp32, so a tie may go either way.
    assert (error <= nearest(scaled, dtype) + 1e-6 * scaled.abs()).all()
    largest = torch.finfo(dtype).max
    tops = found.values.double().abs().amax(dim=(0, 1) if along is None else along)
    assert (tops == largest).all(), "the largest magnitude becomes the format's largest number"


@pytest.mark.parametrize("margin", [1, 3])
@FORMATS
def test_margin_leaves_headroom(dtype: torch.dtype, margin: int) -> None:
    matrix = random(5, 7)
    found = quantize(matrix, absolute_maximum(matrix, None), dtype, margin)
    assert found.values.double().abs().max() == torch.finfo(dtype).max / 2**margin
    again = (found.values.double() * found.inverse_scale).abs().max()
    assert abs(again / matrix.abs().max() - 1) < 1e-6


@FORMATS
def test_what_is_above_the_maximum_saturates(dtype: torch.dtype) -> None:
    found = quantize(torch.tensor([[1.0, 50.0, -50.0]]), torch.ones(1, 1), dtype)
    largest = torch.finfo(dtype).max
    assert found.values.double().tolist() == [[largest, largest, -largest]]


@ALONG
@FORMATS
def test_zeros_stay_zeros(dtype: torch.dtype, along: int | None) -> None:
    zeros = torch.zeros(16, 16)
    found = quantize(zeros, absolute_maximum(zeros, along), dtype)
    assert not found.values.double().any() and found.inverse_scale.isfinite().all() and found.inverse_scale.all()


@pytest.mark.parametrize("size", [1e-30, 1e-36, 1e-40, 1e-45])
@FORMATS
def test_tiny_numbers_are_finite(dtype: torch.dtype, size: float) -> None:
    """Down to the subnormal ones, whose own scale has no finite reciprocal: those round to zero at worst."""
    matrix = torch.tensor([[size, -size / 2]])
    found = quantize(matrix, absolute_maximum(matrix, None), dtype)
    again = found.values.double() * found.inverse_scale.double()
    assert (again - matrix.double()).abs().max() <= max(2**-4 * size, 2.0**-126 * 2**-9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("left", [E4M3, E5M2], ids=str)
def test_what_is_not_finite_is_seen_in_the_product(left: torch.dtype, rowwise: bool, bad: float) -> None:
    matrix, other = random(16, 32), random(16, 32, seed=1)
    matrix[3, 4] = bad
    along = 1 if rowwise else None
    a = quantize(matrix, absolute_maximum(matrix, along), left)
    b = quantize(other, absolute_maximum(other, along), E4M3)
    product = matmul_transposed(a, b, torch.float32, fast=False)
    assert product[3].isnan().all()
    if rowwise:
        assert product[:3].isfinite().all() and product[4:].isfinite().all(), "the other rows have scales of their own"


@pytest.mark.parametrize("rows", [1, 15, 16, 20])
def test_transposing_fills_up_with_zeros(rows: int) -> None:
    matrix = random(rows, 32)
    before = quantize(matrix, absolute_maximum(matrix, 0), E5M2)
    after = transposed(before)
    assert after.values.shape == (32, {1: 16, 15: 16, 16: 16, 20: 32}[rows]) and after.values.is_contiguous()
    assert after.values.dtype == E5M2
    assert after.values[:, :rows].double().equal(before.values.double().t())
    assert not after.values[:, rows:].double().any()
    assert after.inverse_scale.equal(before.inverse_scale.t())


@pytest.mark.parametrize("result", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("left_type", [E4M3, E5M2], ids=str)
def test_product(left_type: torch.dtype, rowwise: bool, result: torch.dtype) -> None:
    along = 1 if rowwise else None
    left, right = random(5, 48), random(32, 48, seed=1)
    a = quantize(left, absolute_maximum(left, along), left_type)
    b = quantize(right, absolute_maximum(right, along), E4M3)
    found = matmul_transposed(a, b, result, fast=False)
    exact = (a.values.double() * a.inverse_scale) @ (b.values.double() * b.inverse_scale).t()
    assert found.dtype == result
    assert (found - exact).abs().max() < (1e-6 if result == torch.float32 else 2**-8) * exact.abs().max()
    assert (exact - left.double() @ right.double().t()).abs().max() < 0.1 * exact.abs().max()
