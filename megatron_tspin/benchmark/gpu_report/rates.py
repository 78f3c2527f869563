"""Peak rates of this device, measured: matrix products in bf16 and FP8, and copies."""

import torch

from megatron_tspin.benchmark.gpu_report.stopwatch import Timing, measure
from megatron_tspin.platform import device, has_cuda

_CUDA_SIZE = 8192
_CPU_SIZE = 512
_REPEATS = 20
_SECONDS = 1.0
_COPY_BYTES = {True: 4 * 2**30, False: 32 * 2**20}


def matrix_size() -> int:
    """Rows and columns of the square matrices."""
    return _CUDA_SIZE if has_cuda() else _CPU_SIZE


def matrix_flops() -> float:
    """Operations of one product; a multiplication and its addition count as two."""
    return 2.0 * matrix_size() ** 3


def _random() -> torch.Tensor:
    return torch.randn(matrix_size(), matrix_size(), device=device(), dtype=torch.bfloat16)


def bf16_product() -> Timing:
    """Times a product of random bf16 matrices."""
    left, right = _random(), _random()
    return measure(lambda: torch.mm(left, right), _SECONDS, repeats=_REPEATS)


def fp8_product(fast_accumulation: bool) -> Timing:
    """Times `torch._scaled_mm` of random e4m3 matrices with one scale a matrix, result in bf16.

    Args:
        fast_accumulation: Sums stay in the matrix unit, with fewer bits.
    """
    left, right = _random().to(torch.float8_e4m3fn), _random().to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=device())

    def product() -> None:
        torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16, use_fast_accum=fast_accumulation)

    return measure(product, _SECONDS, repeats=_REPEATS)


def copy_bytes() -> int:
    """Bytes that a copy reads and writes together."""
    return 2 * _COPY_BYTES[has_cuda()]


def copy() -> Timing:
    """Times a copy within the device's memory, far larger than its caches."""
    source = torch.randint(0, 256, (_COPY_BYTES[has_cuda()],), dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return measure(lambda: target.copy_(source), _SECONDS, repeats=_REPEATS)


def bf16_flops_per_second() -> float:
    """The median rate of `bf16_product`."""
    return matrix_flops() / bf16_product().median
