"""Matrices in FP8, and their product by `torch._scaled_mm`.

A matrix is divided by a scale taken from its own largest magnitude (current scaling), so that it just fills the format.
What the kernel of CUDA asks for, and the CPU's does not mind (torch's `aten/src/ATen/native/cuda/ScaledBlas.cpp`): the
left operand row-major and the right one column-major, so both contiguous along the dimension that is summed over; that
dimension and the columns of the result multiples of 16; at most the left operand in e5m2; scales in fp32.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 16
"""What the kernel needs the summed dimension and the columns of the result to be a multiple of."""

# The smallest normal number: a smaller scale has an infinite reciprocal, and a device may take it for zero.
_SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Quantized:
    """A matrix in FP8: it stands for values * inverse_scale."""

    values: Tensor
    """FP8 [m, n]."""
    inverse_scale: Tensor
    """fp32 [1, 1]; [m, 1] where each row has its own, [1, n] where each column has."""


def absolute_maximum(matrix: Tensor, along: int | None, group: dist.ProcessGroup | None = None) -> Tensor:
    """The largest magnitude, fp32: [1, 1] over all of [m, n], [1, n] along dimension 0, [m, 1] along dimension 1.

    Args:
        matrix: [m, n].
        along: The dimension that disappears; None for both.
        group: The ranks that hold the other parts of the matrix along what disappears; None where there are none.
    """
    found: Tensor = torch.linalg.vector_norm(matrix, torch.inf, dim=along, keepdim=True, dtype=torch.float32)
    if group is not None:
        # Libraries differ in the maximum of NaN and a number; infinity makes everything NaN just as well.
        found = found.nan_to_num(nan=torch.inf, posinf=torch.inf)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return found


def quantize(matrix: Tensor, amax: Tensor, dtype: torch.dtype, margin: int = 0) -> Quantized:
    """The matrix in FP8, saturating at the largest finite value.

    Zeros stay zeros. Where `amax` is infinite or NaN the scale is too, and every sum that it takes part in becomes NaN:
    saturation hides no overflow.

    Args:
        matrix: [m, n] in 16 or 32 bits.
        amax: Its largest magnitude, fp32, as `absolute_maximum` gives it.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        margin: The largest magnitude becomes the format's largest value over 2**margin.
    """
    largest = torch.finfo(dtype).max
    inverse_scale = (amax * (2.0**margin / largest)).clamp_min(_SMALLEST_SCALE)
    # 16 bits over fp32 is fp32.
    values = (matrix / inverse_scale).clamp_(-largest, largest).to(dtype)
    return Quantized(values, inverse_scale)


def transposed(matrix: Quantized) -> Quantized:
    """A row-major copy of the transpose, [n, m padded]: m is filled up with zeros to a multiple of `ALIGNMENT`."""
    rows, columns = matrix.values.shape
    padded = rows + -rows % ALIGNMENT
    values = matrix.values.new_empty((columns, padded))
    values[:, :rows].copy_(matrix.values.t())
    values[:, rows:].zero_()
    return Quantized(values, matrix.inverse_scale.reshape(matrix.inverse_scale.shape[::-1]))


def matmul_transposed(left: Quantized, right: Quantized, dtype: torch.dtype, fast: bool) -> Tensor:
    """The product left @ right.t().

    Args:
        left: [m, k], row-major, with one scale or one a row. May be e5m2.
        right: [n, k], likewise, e4m3; n and k multiples of `ALIGNMENT`.
        dtype: Of the result.
        fast: Hopper may sum in its tensor cores alone, with fewer bits than fp32, instead of moving what they have
            summed to an fp32 sum every few terms.

    Returns:
        [m, n].
    """
    scale_per_row = right.inverse_scale.numel() > 1
    # With CUDA before 12.9 the kernel for a scale a row returns no fp32.
    kernel_dtype = torch.bfloat16 if scale_per_row and left.values.is_cuda else dtype
    product = torch._scaled_mm(
        left.values,
        right.values.t(),
        scale_a=left.inverse_scale,
        scale_b=right.inverse_scale.reshape(1, -1),
        out_dtype=kernel_dtype,
        use_fast_accum=fast,
    )
    return product.to(dtype)
