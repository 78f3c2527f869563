"""A log of its own for what a rank's libraries and the kernel say on stderr.

Lines of NCCL, CUDA or a crash come from C, know no rank, and of many ranks at once nobody can read them. What this
project itself says still goes to the terminal, from rank 0 alone.
"""

import faulthandler
import os
import sys
from pathlib import Path

from megatron_tspin.log import LOG_FILE_VARIABLE
from megatron_tspin.run_folder import beats_folder, rank_log

_STDERR = 2


def separate_stderr() -> None:
    """Does it for a rank that a driver started; to be called once, at the start of the process."""
    log_file = os.environ.get(LOG_FILE_VARIABLE)
    if log_file is None:
        return
    rank = int(os.environ.get("RANK", "0"))
    path = rank_log(beats_folder(Path(log_file)), rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError:  # a full disk: what writes there next will say so
        return
    if rank == 0:
        terminal = os.dup(_STDERR)
        sys.stderr = open(terminal, "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 (it lives as long as the process)
    os.dup2(own, _STDERR)
    os.close(own)
    faulthandler.enable(file=_STDERR, all_threads=False)
