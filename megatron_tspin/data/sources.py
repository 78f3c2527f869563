"""The files in which people keep examples, as rows: JSON Lines (plain, gzip, zstd), Parquet and saved data sets.

What a file is, its first bytes say, not its name. Whatever it is, no more of it is in memory than a batch of rows.
"""

import datetime
import glob
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from megatron_tspin.errors import InputError
from megatron_tspin.storage import parse_json, read_json, sha256_file, sha256_text

MOST_LINE_BYTES = 4 * 2**20
"""A row is refused by its size before it is parsed or tokenized, which takes hundreds of times the memory."""

_FORMATS = "JSON Lines in UTF-8 (plain, gzip or zstd), a Parquet file, or a folder that `datasets` saved"
_OTHER_FORMATS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "compressed twice (gzip)",
    b"\x28\xb5\x2f\xfd": "compressed twice (zstd)",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed (bzip2)",
    b"\xfd7zXZ": "compressed (xz)",
    b"PAR1": "a Parquet file inside another file",
    b"[\n": "a JSON list",
}
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_ARROW_STREAM, _ARROW_FILE = b"\xff\xff\xff\xff", b"ARROW1"
_MOST_MARK = max(map(len, _OTHER_FORMATS)) + 1
_BATCH_ROWS = 256
_COMPRESSED_CHUNK = 1 << 16
_LARGEST_ZSTD_WINDOW = 1 << 31  # `zstd --long=31`
_HUB_FOLDER = "data"  # where data sets of the Hugging Face hub keep their files
_SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class Row:
    """One row as it was read, not parsed yet."""

    number: int
    """From 1, over all files of a source; of JSON Lines also blank ones count."""
    place: str
    """Where it is, as error messages call it: `file:12`, or `file: row 12`."""
    raw: bytes | dict[str, Any]

    def record(self) -> dict[str, Any]:
        """The row as a JSON object.

        Raises:
            InputError: It is none; says what is wrong, without the place.
        """
        if isinstance(self.raw, dict):
            found: dict[str, Any] = _plain(self.raw)
            return found
        return _json_object(self.raw)


def read_rows(source: Path) -> Iterator[Row]:
    """The rows of a source in order, blank lines left out.

    Args:
        source: A file, a folder with Parquet files or one that `datasets` saved, or a pattern such as
            `data/train-*.parquet`, whose files are read in the order of their names.

    Raises:
        InputError: There is no such source, it is of another kind, it is damaged or cut off, or a package is missing
            that reads it. What is wrong with a single row, only `Row.record` tells.
    """
    before = 0
    for path in example_files(source):
        last = 0
        for last, place, raw in _rows_of(path):
            yield Row(before + last, place, raw)
        before += last


def count_rows(source: Path) -> int:
    """Number of rows, without parsing them.

    Raises:
        InputError: As `read_rows`.
    """
    return sum(1 for _ in read_rows(source))


def example_files(source: Path) -> list[Path]:
    """The files of a source, see `read_rows`.

    Raises:
        InputError: There is none, or a folder holds several splits; says how to name one.
    """
    if source.is_dir():
        return _files_of_folder(source)
    if source.is_file():
        return [source]
    if source.exists():
        raise InputError(f"{source}: is not a file, but must be one of examples")
    if glob.has_magic(str(source)):
        found = [Path(name) for name in sorted(glob.glob(str(source))) if Path(name).is_file()]
        if not found:
            raise InputError(f"{source}: no such file of examples: nothing matches the pattern")
        return found
    raise InputError(f"{source}: no such file of examples")


def source_digest(source: Path) -> str:
    """Hex SHA-256 of a source: of its file, or of the names and digests of its files.

    Raises:
        InputError: As `example_files`.
    """
    files = example_files(source)
    if files == [source]:
        return sha256_file(source)
    return sha256_text(json.dumps([[path.name, sha256_file(path)] for path in files]))


def _files_of_folder(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json").get("splits", [])
        raise InputError(f"{folder}: holds the splits {', '.join(splits)}; name one of them, as {folder / splits[0]}")
    if (folder / "state.json").is_file():
        names = [item["filename"] for item in read_json(folder / "state.json").get("_data_files", [])]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise InputError(f"{folder}: the saved data set lacks {', '.join(missing) or 'any data file'}")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.parquet")) or sorted((folder / _HUB_FOLDER).glob("*.parquet"))
    if not files:
        raise InputError(f"{folder}: is not a file of examples, nor a folder with Parquet files or saved by `datasets`")
    splits = {match["split"] if (match := _SHARD.match(path.name)) else path.stem for path in files}
    if len(splits) > 1:
        raise InputError(
            f"{folder}: holds {', '.join(sorted(splits))}; name the files that are meant with a pattern, as "
            f"'{files[0].parent / min(splits)}*.parquet'"
        )
    return files


def _rows_of(path: Path) -> Iterator[tuple[int, str, bytes | dict[str, Any]]]:
    """Number in the file, place and content of each row of one file."""
    with _explained(path):
        with path.open("rb") as stream:
            mark = stream.read(_MOST_MARK)
        if mark.startswith((_PARQUET, _ARROW_STREAM, _ARROW_FILE)):
            records = _parquet_records if mark.startswith(_PARQUET) else _arrow_records
            for number, record in enumerate(records(path), start=1):
                yield number, f"{path}: row {number}", record
            return
        for number, raw in _lines(path, _opener(path, mark)):
            yield number, f"{path}:{number}", raw


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what libraries raise over a file into an error that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: the compressed file is damaged or cut off: {error}; copy it again") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error


def _opener(path: Path, mark: bytes) -> Callable[[], io.BufferedIOBase]:
    if mark.startswith(_GZIP):
        return lambda: gzip.open(path, "rb")
    if mark.startswith(_ZSTD):
        try:
            import zstandard
        except ImportError as error:
            raise InputError(_needs(path, "compressed with zstd", "zstandard", "zstd")) from error

        return lambda: io.BufferedReader(_ZstdStream(path, zstandard), _COMPRESSED_CHUNK)
    return lambda: path.open("rb")


def _needs(path: Path, what: str, package: str, extra: str) -> str:
    return f"{path}: is {what}, which {package} reads: pip install {package} (or 'megatron_tspin[{extra}]')"


class _ZstdStream(io.RawIOBase):
    """Frames of zstd one after another; zstandard's own reader takes a file that was cut off for a shorter one."""

    def __init__(self, path: Path, zstandard: Any) -> None:
        self._compressed = path.open("rb")
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_ZSTD_WINDOW)
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._compressed.read(_COMPRESSED_CHUNK) if self._frame is None else self._rest()
            if not chunk and self._frame is None:
                return 0
            self._ready = self._decompressed(chunk)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._compressed.close()
        super().close()

    def _rest(self) -> bytes:
        chunk = self._compressed.read(_COMPRESSED_CHUNK)
        if not chunk:
            raise EOFError("it ends inside a zstd frame")
        return chunk

    def _decompressed(self, chunk: bytes) -> bytes:
        parts = []
        try:
            while chunk:
                self._frame = self._frame or self._decompressor.decompressobj()
                parts.append(self._frame.decompress(chunk))
                if not self._frame.eof:
                    break
                chunk, self._frame = self._frame.unused_data, None
        except self._error as error:
            raise EOFError(str(error)) from error
        return b"".join(parts)


def _lines(path: Path, opener: Callable[[], io.BufferedIOBase]) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of the lines that are not blank; no more of one is read than may be used."""
    with opener() as stream:
        for number in count(1):
            raw = stream.readline(MOST_LINE_BYTES + 1)
            if not raw:
                return
            if len(raw) > MOST_LINE_BYTES:
                raise InputError(
                    f"{path}:{number}: more than {MOST_LINE_BYTES} bytes on one line, which is more than a million "
                    "tokens; an example is one prompt and one response"
                )
            if number == 1:
                _refuse_other_formats(path, raw)
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put before UTF-8
            if raw.strip():
                yield number, raw


def _refuse_other_formats(path: Path, start: bytes) -> None:
    found = next((name for mark, name in _OTHER_FORMATS.items() if start.startswith(mark)), None)
    if found is not None:
        raise InputError(f"{path}: is {found}, but must be {_FORMATS}")


def _parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    pyarrow, parquet = _pyarrow(path, "a Parquet file")
    try:
        with parquet.ParquetFile(path, buffer_size=_COMPRESSED_CHUNK) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: the Parquet file cannot be read: {_one_line(error)}") from error


def _arrow_records(path: Path) -> Iterator[dict[str, Any]]:
    """Of a file that `datasets` saved, which is a stream of Arrow's, or of one in Arrow's file format."""
    pyarrow, _ = _pyarrow(path, "an Arrow file of `datasets`")
    try:
        with pyarrow.memory_map(str(path)) as source:
            if source.read(len(_ARROW_FILE)) == _ARROW_FILE:
                file = pyarrow.ipc.open_file(source)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
            else:
                source.seek(0)
                batches = iter(pyarrow.ipc.open_stream(source))
            for batch in batches:
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    yield from batch.slice(start, _BATCH_ROWS).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: the Arrow file cannot be read: {_one_line(error)}") from error


def _pyarrow(path: Path, what: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(_needs(path, what, "pyarrow", "parquet")) from error
    return pyarrow, pyarrow.parquet


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _plain(value: Any) -> Any:
    """A value of Arrow's as JSON has it: times as ISO texts, null for bytes (images and such) and what is no number."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value)


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        value = parse_json(raw.decode("utf-8"), _refuse_constant)
        if b"\\ud" in raw.lower():  # an escaped half of a surrogate pair is JSON, but no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not valid UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise InputError("holds half of a surrogate pair (an escape such as \\ud800), which is no character") from error
    except json.JSONDecodeError as error:
        if not raw.endswith(b"\n"):
            raise InputError(
                f"not valid JSON, and the file ends here without a line break: it seems to be cut off ({error.msg})"
            ) from error
        raise InputError(f"not valid JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
