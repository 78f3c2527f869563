"""Files that are whole or absent: write under a temporary name, flush, rename."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_tspin.errors import ArtifactError, DiskFullError, InputError

_TEMPORARY_SUFFIX = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "unexpected pos",
)  # the last: torch's


def fsync_path(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path, needed: int | None = None) -> Iterator[Path]:
    """Yields a temporary sibling of `path` to write to; it takes the name `path` only if the block succeeds.

    The temporary may become a file or a folder. What an interrupted writer left under its name is overwritten; where
    the block fails, what it wrote is removed.

    Args:
        path: The name.
        needed: Bytes that will be written, for an error message.

    Raises:
        DiskFullError: The disk, a quota or a limit is used up.
    """
    temporary = path.with_name(path.name + _TEMPORARY_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if temporary.is_dir():
            shutil.rmtree(temporary)
        yield temporary
        inside = [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]
        for entry in inside:
            fsync_path(entry)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except BaseException as error:
        _remove(temporary)
        if is_full(error):
            raise DiskFullError(explain_full(path, error, needed)) from error
        raise


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def is_full(error: BaseException) -> bool:
    """Whether something could not be written for want of space; libraries say so in texts of their own."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    text = str(error)
    return isinstance(error, Exception) and any(words in text for words in _FULL_TEXTS)


def explain_full(path: Path, error: BaseException, needed: int | None = None) -> str:
    """One line about a disk that is full: which file, why, bytes needed and free."""
    existing = next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip().splitlines()[0]
    needs = f"it needs {needed} bytes, " if needed is not None else ""
    return (
        f"{path}: cannot be written: {reason}; {needs}{shutil.disk_usage(existing).free} are free on its disk; free "
        "some space, or raise the quota, and run the same command again"
    )


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically."""
    content = text.encode("utf-8")
    with atomic_path(path, len(content)) as temporary:
        temporary.write_bytes(content)


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


def refuse_existing_folder(path: Path) -> None:
    """What a person names on the command line as a folder to write is not overwritten, unlike a run's own files.

    Raises:
        InputError: There is a file, or a folder that is not empty.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: exists already; give --save the name of a new folder")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Hex SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
