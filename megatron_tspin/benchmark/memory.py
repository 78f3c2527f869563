"""Peak memory of this process: of its GPU if it computes on one, of the process otherwise."""

import ctypes
import gc
import re
import sys
from pathlib import Path

import torch

from megatron_tspin.platform import has_cuda

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size
_MIB = 2**20


class PeakMemory:
    """Peak memory since the last `reset`, above what was held when this was made.

    Attributes:
        held_mib: MiB held when this was made.
        method: How it is measured, for the reader of the result.
    """

    def __init__(self) -> None:
        self.release()
        self.held_mib = torch.cuda.memory_allocated() / _MIB if has_cuda() else _status_mib("VmRSS")
        self.method = "torch.cuda.max_memory_allocated" if has_cuda() else "VmHWM of /proc/self/status"
        if not self.reset():
            self.method += ", since the start of the process: it could not be reset"

    def reset(self) -> bool:
        """Forgets the peak so far; False where the kernel does not let this process."""
        if has_cuda():
            torch.cuda.reset_peak_memory_stats()
            return True
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK)
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Gives freed memory back: to other processes, and so that it is no part of the next peak."""
        gc.collect()
        if has_cuda():
            torch.cuda.empty_cache()
        elif sys.platform == "linux":
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):  # glibc
                libc.malloc_trim(0)

    def peak_mib(self) -> float:
        """MiB of the peak above `held_mib`."""
        peak = torch.cuda.max_memory_allocated() / _MIB if has_cuda() else _status_mib("VmHWM")
        return peak - self.held_mib


def _status_mib(field: str) -> float:
    """A field of /proc/self/status in MiB; not a number where there is no such file (not Linux)."""
    if not _STATUS.is_file():
        return float("nan")
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return float("nan") if found is None else int(found[1]) / 1024
