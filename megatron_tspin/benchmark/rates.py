"""Peak rates of this device, measured: matrix products in fp32, bf16 and FP8, and copies."""

import torch

from megatron_tspin.benchmark.stopwatch import Timing, measure
from megatron_tspin.platform import device, has_cuda

_CUDA_SIZE = 8192
_CPU_SIZE = 2048
_REDUCED_SIZE = 512
_REPEATS = 20
_SECONDS = 1.0
_COPY_BYTES = {True: 4 * 2**30, False: 32 * 2**20}


def matrix_size(cpu_size: int = _REDUCED_SIZE) -> int:
    """Rows and columns of the square matrices; those of a CPU keep the reduced form of the GPU report short."""
    return _CUDA_SIZE if has_cuda() else cpu_size


def matrix_flops(size: int) -> float:
    """Operations of one product; a multiplication and its addition count as two."""
    return 2.0 * size**3


def _random(size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(size, size, device=device(), dtype=dtype)


def product(size: int, dtype: torch.dtype = torch.bfloat16) -> Timing:
    """Times a product of random matrices in fp32 or bf16."""
    left, right = _random(size, dtype), _random(size, dtype)
    return measure(lambda: torch.mm(left, right), _SECONDS, repeats=_REPEATS)


def fp8_product(size: int, fast_accumulation: bool) -> Timing:
    """Times `torch._scaled_mm` of random e4m3 matrices with one scale a matrix, result in bf16.

    Args:
        size: Rows and columns.
        fast_accumulation: Sums stay in the matrix unit, with fewer bits.
    """
    left, right = _random(size).to(torch.float8_e4m3fn), _random(size).to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=device())

    def multiply() -> None:
        torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16, use_fast_accum=fast_accumulation)

    return measure(multiply, _SECONDS, repeats=_REPEATS)


def copy() -> tuple[Timing, int]:
    """Times a copy within the device's memory, far larger than its caches; and the bytes that it copies."""
    count = _COPY_BYTES[has_cuda()]
    source = torch.randint(0, 256, (count,), dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return measure(lambda: target.copy_(source), _SECONDS, repeats=_REPEATS), count


def bf16_rate() -> float:
    """Operations a second of the median `product` in bf16 of the GPU report's size."""
    return matrix_flops(matrix_size()) / product(matrix_size()).median


def fp8_rate() -> float:
    """The same of `fp8_product` with fast accumulation."""
    return matrix_flops(matrix_size()) / fp8_product(matrix_size(), fast_accumulation=True).median


def matmul_rate(bf16: bool) -> float:
    """Operations a second of the fastest product in bf16 or fp32, of 2048^3 on a CPU."""
    size = matrix_size(_CPU_SIZE)
    return matrix_flops(size) / product(size, torch.bfloat16 if bf16 else torch.float32).low
