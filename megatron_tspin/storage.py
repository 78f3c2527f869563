"""Files that are whole or absent: write under a temporary name, flush, rename."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_tspin.errors import ArtifactError, InputError

_TEMPORARY_SUFFIX = ".partial"


def fsync_path(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` to write to; it takes the name `path` only if the block succeeds.

    The temporary may become a file or a folder. What an interrupted writer left under its name is overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + _TEMPORARY_SUFFIX)
    if temporary.is_dir():
        shutil.rmtree(temporary)
    yield temporary
    inside = [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]
    for entry in inside:
        fsync_path(entry)
    os.replace(temporary, path)
    fsync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, without the mark that some editors put before it.

    Raises:
        InputError: The file is missing, cannot be read, or is not UTF-8.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: The file is missing or cannot be read.
        ArtifactError: It is not JSON, or an object in it has a key twice.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ArtifactError(f"{path}: not valid JSON ({error})") from error


def parse_json(text: str, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """The value of a JSON text in which no object has a key twice; Python alone would let the last value win.

    Args:
        text: The JSON text.
        parse_constant: What NaN and infinities become, as for `json.loads`.

    Raises:
        ValueError: It is not JSON, or an object has a key twice.
    """
    try:
        return json.loads(text, parse_constant=parse_constant, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key `{twice}` stands in one object twice; leave one of them out")
    return found


def refuse_existing(path: Path, overwrite: bool) -> None:
    """For an output file that a person names: refuses what is there already, unless it is to be replaced.

    Raises:
        InputError: Something is there that is not to be replaced, or is no file.
    """
    if os.path.lexists(path) and not path.is_file():
        raise InputError(f"{path}: the output must be a file")
    if path.is_file() and not overwrite:
        raise InputError(f"{path}: exists already; name another file, or add --overwrite to replace it")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Hex SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
