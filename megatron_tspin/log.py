"""Log lines and progress bars, the same in the driver and in every rank.

Only one rank of a stage speaks; the others pass `speak=False`. The package never prints.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_REFRESH_SECONDS_WITHOUT_TERMINAL = 10.0


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


def progress_bar(description: str, total: int, unit: str, speak: bool = True, done: int = 0) -> Any:
    """A bar with rate and time left; without a terminal it refreshes every ten seconds instead.

    Args:
        description: What is being done, e.g. "train iteration 1".
        total: Number of units in all.
        unit: Name of one unit, e.g. "step".
        speak: False draws nothing (ranks other than the first).
        done: Units that an earlier, interrupted process did.
    """
    return tqdm(
        desc=description,
        total=total,
        unit=unit,
        initial=done,
        disable=not speak,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else _REFRESH_SECONDS_WITHOUT_TERMINAL,
        leave=True,
        ascii=None if os.environ.get("LANG", "").upper().endswith("UTF-8") else True,
    )


def track(items: Iterable[Item], description: str, total: int, unit: str, speak: bool = True) -> Iterator[Item]:
    """Yields the items and draws a progress bar."""
    with progress_bar(description, total, unit, speak) as bar:
        for item in items:
            yield item
            bar.update()
