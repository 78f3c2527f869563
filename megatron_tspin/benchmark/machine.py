"""The machine that a benchmark ran on."""

import os
import platform
import re
from pathlib import Path
from typing import Any

_CPU_INFO = Path("/proc/cpuinfo")
_MEMORY_INFO = Path("/proc/meminfo")


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
