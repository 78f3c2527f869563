"""Says in one line where a rank is, and which collective failed because another one hangs or is gone.

torch tells that by a RuntimeError whose text names a line of gloo or NCCL, but not what was being done.
"""

import re
import traceback
from collections.abc import Sequence
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
    if not (_TIMED_OUT.search(reason) or _GONE.search(reason)):
        return None
    where = place(traceback.extract_tb(error.__traceback__))
    if _TIMED_OUT.search(reason):
        return LostRankError(f"waited too long for another rank in {where}: it hangs, or is far behind ({reason})")
    return LostRankError(f"lost another rank in {where}: what it says is the cause ({reason})")


def is_collective(frame: traceback.FrameSummary) -> bool:
    """Whether a frame is torch.distributed's, which mostly waits for other ranks."""
    return {"torch", "distributed"} <= set(Path(frame.filename).parts)


def place(frames: Sequence[traceback.FrameSummary]) -> str:
    """The collective that a stack is in, or else its innermost function, and the line of this project that wanted it.

    Args:
        frames: Innermost last, at least one.
    """
    names = [frame.name for frame in frames if is_collective(frame)]
    innermost = next((name for name in reversed(names) if name not in _WRAPPERS), frames[-1].name)
    for frame in reversed(frames):
        path = Path(frame.filename)
        if path.is_relative_to(_PACKAGE) and path != _GROUPS:
            line = f"{path.relative_to(_PACKAGE.parent)}:{frame.lineno}"
            return f"{innermost} ({line})" if frame is frames[-1] else f"{innermost}, called by {frame.name} ({line})"
    return innermost
