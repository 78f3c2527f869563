"""A network file system as one rank sees it: what others wrote is not there yet."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

_LOOKS = {"is_file": False, "is_dir": False, "exists": False, "iterdir": (), "glob": (), "rglob": ()}


@contextmanager
def stale_on_rank_1(*places: Path, below: bool = True) -> Iterator[None]:
    """On ranks: rank 1 sees nothing at these places nor, unless told otherwise, below them."""
    with ExitStack() as patches:
        if os.environ["RANK"] == "1":
            for name, nothing in _LOOKS.items():
                patches.enter_context(patch.object(Path, name, _stale(getattr(Path, name), nothing, places, below)))
        yield


def _stale(look: Any, nothing: Any, places: tuple[Path, ...], below: bool) -> Any:
    def see(path: Path, *arguments: Any) -> Any:
        by_a_writer = sys._getframe(1).f_globals["__name__"].startswith("pathlib")  # `mkdir` looks for itself
        if not by_a_writer and any(path == place or below and path.is_relative_to(place) for place in places):
            return iter(nothing) if nothing == () else nothing
        return look(path, *arguments)

    return see
