"""The user's function that judges an answer."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_tspin.errors import InputError
from megatron_tspin.storage import sha256_file

Scorer = Callable[[Mapping[str, Any], str], float]
"""Takes the user's record of the example and the text of an answer; returns a score from 0 to 1."""


def load_scorer(name: str) -> Scorer:
    """Loads `path/to/file.py:function` or `package.module:function`.

    Raises:
        InputError: There is no such file, module or function.
    """
    place, separator, function = name.rpartition(":")
    if not separator:
        raise InputError(f"evaluation.scorer = {name!r}: write it as path/to/file.py:function or module:function")
    module = _from_file(Path(place), name) if place.endswith(".py") else _from_module(place, name)
    scorer = getattr(module, function, None)
    if not callable(scorer):
        raise InputError(f"evaluation.scorer = {name!r}: {place} has no function `{function}`")
    found: Scorer = scorer
    return found


def scorer_digest(name: str) -> str:
    """Hex SHA-256 of the scorer's file, or the name of its installed module.

    Raises:
        InputError: The file is not there.
    """
    place = name.rpartition(":")[0]
    if not place.endswith(".py"):
        return place
    if not Path(place).is_file():
        raise InputError(f"evaluation.scorer = {name!r}: {place} is not a file")
    return sha256_file(Path(place))


def _from_file(path: Path, name: str) -> Any:
    if not path.is_file():
        raise InputError(f"evaluation.scorer = {name!r}: {path} is not a file")
    spec = importlib.util.spec_from_file_location(f"tspin_scorer_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


def _from_module(place: str, name: str) -> Any:
    try:
        return importlib.import_module(place)
    except (ImportError, TypeError, ValueError) as error:  # the last two: no name, or a relative one
        raise InputError(f"evaluation.scorer = {name!r}: {error}") from error


def score_answer(scorer: Scorer, record: Mapping[str, Any], text: str, example_id: str) -> float:
    """Calls the scorer.

    Raises:
        InputError: It failed, or returned something other than a number from 0 to 1; names the scorer and the example.
    """
    name = getattr(scorer, "__name__", repr(scorer))
    try:
        score = scorer(record, text)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__, limit=2)[-1]  # the line of the scorer, not of what it called
        raise InputError(
            f"{place.filename}:{place.lineno}: the scorer `{name}` failed for example {example_id}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(score, int | float) or not 0.0 <= score <= 1.0:
        raise InputError(
            f"the scorer `{name}` returned {score!r} for example {example_id}; it must return a number from 0 to 1"
        )
    return float(score)
