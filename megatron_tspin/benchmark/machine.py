"""The machine that a benchmark ran on, and the rate at which it multiplies matrices."""

import os
import platform
import re
from pathlib import Path
from typing import Any

_CPU_INFO = Path("/proc/cpuinfo")
_MEMORY_INFO = Path("/proc/meminfo")
_MATRIX = 2048
_CUDA_MATRIX = 8192
_REPEATS = 5


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, Any]:
    """CPU model, cores, memory, load and system, as far as the system says."""
    return {
        "cpu": _found(_CPU_INFO, r"^model name\s*:\s*(.+)$") or platform.processor() or platform.machine(),
        "cores": cores(),
        "memory_gib": round(int(_found(_MEMORY_INFO, r"^MemTotal:\s+(\d+) kB$") or 0) / 2**20, 1) or None,
        "load_average_before": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _found(path: Path, pattern: str) -> str | None:
    if not path.is_file():
        return None
    found = re.search(pattern, path.read_text(), re.MULTILINE)
    return found[1].strip() if found else None


def matmul_rate(bf16: bool) -> float:
    """Best rate of a few square matrix products in FLOP per second, on the device and with the threads of this process.

    On a CPU of 2048^3, on a GPU of 8192^3; in bfloat16 or fp32.
    """
    import torch

    from megatron_tspin.benchmark.timing import timed
    from megatron_tspin.platform import device, has_cuda

    size = _CUDA_MATRIX if has_cuda() else _MATRIX
    left, right = (
        torch.rand(size, size, device=device(), dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2)
    )
    seconds = min(timed(lambda: torch.mm(left, right))[1].seconds for _ in range(_REPEATS))
    return 2 * size**3 / seconds
