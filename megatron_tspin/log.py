"""Log lines and progress bars, the same in the driver and in every rank.

Only one rank of a stage speaks; the others pass `speak=False`. The package never prints.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from megatron_tspin.heartbeat import beat

Item = TypeVar("Item")

LOG_FILE_VARIABLE = "TSPIN_LOG_FILE"
"""Names the file to which the ranks of a stage also write their log lines and tracebacks."""

_TERMINAL_REFRESH_SECONDS = 0.5
_LINE_SECONDS = 10.0
_BYTES = "B"


def get_logger(name: str) -> logging.Logger:
    """A logger below the package's own."""
    return logging.getLogger(name)


def set_up_logging(speak: bool = True) -> None:
    """Sends log lines of this package to stderr, `speak=False` only warnings and worse."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    package = logging.getLogger("megatron_tspin")
    package.handlers[:] = [handler]
    package.propagate = False
    package.setLevel(logging.INFO if speak else logging.WARNING)
    # megatron-core tells at import which optional packages (Transformer Engine, apex) are absent.
    warnings.filterwarnings("ignore", module=r"megatron\..*")


def progress_bar(description: str, total: int | None, unit: str, speak: bool = True, done: int = 0) -> Any:
    """A bar with rate and time left; without a terminal a line every ten seconds instead. Each update is a heartbeat.

    Args:
        description: What is being done, e.g. "train iteration 1".
        total: Number of units in all; None if nobody knows yet.
        unit: Name of one unit, e.g. "step"; "B" is shown as KiB, MiB and so on.
        speak: False draws nothing (ranks other than the first).
        done: Units that an earlier, interrupted process did.
    """
    beat(description)
    pause = _TERMINAL_REFRESH_SECONDS if sys.stderr.isatty() else _LINE_SECONDS
    return _BeatingBar(
        file=sys.stderr if sys.stderr.isatty() else _Lines(),
        delay=0.0 if sys.stderr.isatty() else pause,
        desc=description,
        total=total,
        unit=unit if unit != _BYTES else "iB",
        unit_scale=unit == _BYTES,
        unit_divisor=1024,
        initial=done,
        disable=not speak or (total is not None and done >= total),
        dynamic_ncols=True,
        mininterval=pause,
        leave=True,
        ascii=None if os.environ.get("LANG", "").upper().endswith("UTF-8") else True,
    )


if TYPE_CHECKING:
    _Bar = tqdm[Any]
else:
    _Bar = tqdm


class _BeatingBar(_Bar):
    """What tells people that a loop goes on tells the driver too."""

    def update(self, n: float | None = 1) -> bool | None:
        """Counts n units more."""
        beat()
        drawn: bool | None = super().update(n)
        return drawn


class _Lines:
    """Stderr as tqdm sees it when that is a file: each state of the bar is a line of its own."""

    def write(self, text: str) -> None:
        """Writes a state of the bar; what only moves the cursor is left out."""
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        """Does nothing: stderr is not buffered by more than a line."""


def track(items: Iterable[Item], description: str, total: int, unit: str, speak: bool = True) -> Iterator[Item]:
    """Yields the items and draws a progress bar."""
    with progress_bar(description, total, unit, speak) as bar:
        for item in items:
            yield item
            bar.update()
