"""Says in one line which collective failed because another rank hangs or is gone.

torch tells that by a RuntimeError whose text names a line of gloo or NCCL, but not what was being done.
"""

import re
import traceback
from pathlib import Path

from megatron_tspin.errors import LostRankError

_PACKAGE = Path(__file__).parent
_GROUPS = _PACKAGE / "parallel.py"  # who called it tells more
_BACKENDS = re.compile(r"gloo|nccl", re.IGNORECASE)
_TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)
_GONE = re.compile(r"closed by peer|reset by peer|broken pipe|remote process|remote error", re.IGNORECASE)
_SOURCE_LINE = re.compile(r"^\[\S+:\d+\] ")  # of the backend's source
_WRAPPERS = ("wrapper", "wait")


def explain(error: BaseException) -> LostRankError | None:
    """What to tell a person about the failure of a collective; None if the error is of another kind.

    Args:
        error: With the traceback that it was raised with.
    """
    if not isinstance(error, RuntimeError) or not _BACKENDS.search(str(error)):
        return None
    reason = _SOURCE_LINE.sub("", str(error).strip().split("\n")[0]).split(". ")[0]
    if _TIMED_OUT.search(reason):
        return LostRankError(
            f"waited too long for another rank in {_where(error)}: it hangs, or is far behind ({reason})"
        )
    if _GONE.search(reason):
        return LostRankError(f"lost another rank in {_where(error)}: what it says is the cause ({reason})")
    return None


def _where(error: RuntimeError) -> str:
    """The collective, and the innermost line of this project that wanted it."""
    frames = traceback.extract_tb(error.__traceback__)
    names = [frame.name for frame in frames if {"torch", "distributed"} <= set(Path(frame.filename).parts)]
    collective = next((name for name in reversed(names) if name not in _WRAPPERS), frames[-1].name)
    for frame in reversed(frames):
        path = Path(frame.filename)
        if path.is_relative_to(_PACKAGE) and path != _GROUPS:
            return f"{collective}, called by {frame.name} ({path.relative_to(_PACKAGE.parent)}:{frame.lineno})"
    return collective
