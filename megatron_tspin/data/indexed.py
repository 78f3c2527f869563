"""Token documents in Megatron's `.bin` / `.idx` format, with a JSON sidecar that says what they must be.

The files are those of megatron-core's `IndexedDatasetBuilder` to the byte, one sequence per document, so every
Megatron tool reads them. Written and read with numpy alone: megatron-core's reader opens a truncated `.bin`, and an
array of it crashes the process once its data set is gone.
"""

import hashlib
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from megatron_tspin.errors import ArtifactError, InputError
from megatron_tspin.records import Record
from megatron_tspin.run_folder import file_of
from megatron_tspin.storage import atomic_path, fsync_path, read_json, sha256_file, write_json

_MAGIC = b"MMIDIDX\x00\x00"
_FORMAT_VERSION = 1
_SIDECAR_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
_DTYPE_CODES = {"int32": 4, "uint16": 8}
_LARGEST_UINT16_VOCABULARY = 1 << 16
_BATCH = 1024
"""Documents that are written at once."""
_REMEDY = "let `tspin run --repair` make it again, or delete the files of this stem and run the stage that wrote them"


class Sidecar(Record):
    """What the two binary files must be."""

    version: int
    documents: int = Field(ge=1)
    tokens: int = Field(ge=1)
    dtype: str
    largest_id: int
    vocab_size: int
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    facts: dict[str, Any]
    """What the writer knows about the tokens, e.g. the fingerprints of tokenizer and template."""


def write_documents(
    path_stem: Path, documents: Iterable[Sequence[int]], vocab_size: int, facts: Mapping[str, Any]
) -> None:
    """Writes documents of token ids; each file is whole or absent, the sidecar comes last.

    Args:
        path_stem: E.g. `run/data/train_prompt`, for `train_prompt_document.bin`, `.idx` and `.json`.
        documents: Token ids of each document; a document may be empty.
        vocab_size: Ids must be below it; up to 65536 they take two bytes each, else four.
        facts: What else to keep in the sidecar; JSON.

    Raises:
        InputError: An id is not in [0, vocab_size), or there is not a single token.
    """
    with document_writer(path_stem, vocab_size, lambda: facts) as writer:
        writer.extend(documents)


@contextmanager
def document_writer(
    path_stem: Path, vocab_size: int, facts: Callable[[], Mapping[str, Any]]
) -> Iterator["DocumentWriter"]:
    """Writes documents as they come; what was there before stays untouched until the block has succeeded.

    Args:
        path_stem: As for `write_documents`.
        vocab_size: Likewise.
        facts: Called when the block has ended.

    Raises:
        InputError: As `write_documents`.
    """
    bin_path, idx_path, sidecar_path = (file_of(path_stem, kind) for kind in ("bin", "idx", "json"))
    with atomic_path(bin_path) as temporary:
        with temporary.open("wb") as stream:
            writer = DocumentWriter(stream, vocab_size, path_stem)
            yield writer
        lengths = writer.lengths()
        if sidecar_path.exists():  # from here until the end the old sidecar would vouch for the wrong files
            sidecar_path.unlink()
            fsync_path(sidecar_path.parent)
    with atomic_path(idx_path) as temporary:
        temporary.write_bytes(_index_bytes(lengths, writer.dtype.name))
    sidecar = Sidecar(
        version=_SIDECAR_VERSION,
        documents=len(lengths),
        tokens=int(lengths.sum()),
        dtype=writer.dtype.name,
        largest_id=writer.largest_id,
        vocab_size=vocab_size,
        bin_bytes=bin_path.stat().st_size,
        bin_sha256=writer.sha256(),
        idx_bytes=idx_path.stat().st_size,
        idx_sha256=sha256_file(idx_path),
        facts=dict(facts()),
    )
    write_json(sidecar_path, sidecar.model_dump())


class DocumentWriter:
    """Appends documents to a stream, four bytes of memory each; opened with `document_writer`."""

    def __init__(self, stream: BinaryIO, vocab_size: int, stem: Path) -> None:
        self.dtype: np.dtype[Any] = np.dtype("uint16" if vocab_size <= _LARGEST_UINT16_VOCABULARY else "int32")
        self.largest_id = -1
        self._stream = stream
        self._vocab_size = vocab_size
        self._stem = stem
        self._lengths = array("i")
        self._hash = hashlib.sha256()

    def extend(self, documents: Iterable[Sequence[int]]) -> None:
        """Writes documents of token ids.

        Raises:
            InputError: An id is not in [0, vocab_size).
        """
        rest = iter(documents)
        while batch := list(islice(rest, _BATCH)):
            self._append(batch)

    def _append(self, documents: Sequence[Sequence[int]]) -> None:
        """All at once, as a call of numpy costs as much as a hundred tokens."""
        lengths = array("i", map(len, documents))
        try:
            ids = np.array(list(chain.from_iterable(documents)))
        except ValueError as error:  # documents of documents
            raise self._not_flat(documents) from error
        if ids.size:
            if ids.ndim != 1 or ids.dtype.kind not in "iu":
                raise self._not_flat(documents)
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self._vocab_size:
                wrong = low if low < 0 else high
                number = self._first(documents, lambda document: wrong in document)
                raise InputError(
                    f"{self._stem}: document {number} has token id {wrong}, outside of the vocabulary of "
                    f"{self._vocab_size}; the tokenizer does not belong to this model"
                )
            self.largest_id = max(self.largest_id, high)
            written = ids.astype(self.dtype).tobytes()
            self._stream.write(written)
            self._hash.update(written)
        self._lengths.extend(lengths)

    def _not_flat(self, documents: Sequence[Sequence[int]]) -> InputError:
        return InputError(
            f"{self._stem}: document {self._first(documents, _is_not_flat)} is not a flat list of token ids"
        )

    def _first(self, documents: Sequence[Sequence[int]], wanted: Callable[[Sequence[int]], bool]) -> int:
        """Number of the first of these documents, which are the next ones, that is as wanted."""
        return len(self._lengths) + next(number for number, each in enumerate(documents) if wanted(each))

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 [documents].

        Raises:
            InputError: There is not a single token.
        """
        if self.largest_id < 0:
            count = len(self._lengths)
            raise InputError(f"{self._stem}: {count} documents without a single token; there is nothing to write")
        return np.array(self._lengths, dtype=np.int64)

    def sha256(self) -> str:
        """Hex SHA-256 of the tokens written."""
        return self._hash.hexdigest()


def _is_not_flat(document: Sequence[int]) -> bool:
    return not all(isinstance(token, int | np.integer) and abs(token) < 2**63 for token in document)


def _index_bytes(lengths: NDArray[np.int64], dtype: str) -> bytes:
    count = len(lengths)
    header = _HEADER.pack(_MAGIC, _FORMAT_VERSION, _DTYPE_CODES[dtype], count, count + 1)
    arrays = (lengths.astype("<i4"), _pointers(lengths, dtype), np.arange(count + 1, dtype="<i8"))
    return header + b"".join(array.tobytes() for array in arrays)


def _pointers(lengths: NDArray[np.int64], dtype: str) -> NDArray[np.int64]:
    """Byte offset of each document, without gaps."""
    ends = np.cumsum(lengths.astype("<i8")) * np.dtype(dtype).itemsize
    return np.concatenate([np.zeros(1, dtype="<i8"), ends[:-1]])


class Documents:
    """Token documents, opened with `open_documents`."""

    def __init__(self, path_stem: Path, sidecar: Sidecar, lengths: NDArray[np.int64], ids: NDArray[Any]) -> None:
        self.path_stem = path_stem
        self.facts: Mapping[str, Any] = sidecar.facts
        self.vocab_size = sidecar.vocab_size
        self._bin_sha256 = sidecar.bin_sha256
        self.lengths = lengths
        """Number of tokens of each document, int64 [documents]."""
        self._ends = np.cumsum(lengths)
        self._ids = ids

    def __len__(self) -> int:
        return len(self.lengths)

    def check_unchanged(self) -> None:
        """Hashes the tokens again: what is mapped and not read into memory may be rewritten while it is in use.

        Raises:
            ArtifactError: They are no longer what was opened.
        """
        path = file_of(self.path_stem, "bin")
        found = sha256_file(path) if path.is_file() else "that of no file"
        if found != self._bin_sha256:
            raise ArtifactError(
                f"{path}: was rewritten while it was in use (SHA-256 {found}, {self._bin_sha256} when it was opened); "
                f"what was made since it was last checked is not kept; {_REMEDY}"
            )

    def __getitem__(self, index: int) -> list[int]:
        """Ids of one document, a list of its own."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path_stem}: document {index} of {len(self)}")
        end = int(self._ends[index])
        ids: list[int] = self._ids[end - int(self.lengths[index]) : end].tolist()
        return ids


def open_documents(path_stem: Path) -> Documents:
    """Opens documents and checks that they are what was written; reads both files once.

    Args:
        path_stem: As given to `write_documents`.

    Raises:
        ArtifactError: A file is missing, torn, changed or of another data set; names path and both values.
    """
    sidecar = read_sidecar(path_stem)
    bin_path, idx_path = file_of(path_stem, "bin"), file_of(path_stem, "idx")
    _check_sizes({bin_path: sidecar.bin_bytes, idx_path: sidecar.idx_bytes})
    index = idx_path.read_bytes()
    lengths = _parse_index(index, idx_path, sidecar)
    ids = np.memmap(bin_path, dtype=sidecar.dtype, mode="r")
    _expect(idx_path, "SHA-256", hashlib.sha256(index).hexdigest(), sidecar.idx_sha256)
    _expect(bin_path, "SHA-256", sha256_file(bin_path), sidecar.bin_sha256)
    _expect(bin_path, "largest id", int(ids.max()), sidecar.largest_id)
    return Documents(path_stem, sidecar, lengths, ids)


def read_lengths(path_stem: Path) -> NDArray[np.int64]:
    """Tokens of each document, int64 [documents], from the index alone; the tokens themselves are not looked at.

    Raises:
        ArtifactError: Sidecar or index are missing, torn or contradict each other.
    """
    sidecar, path = read_sidecar(path_stem), file_of(path_stem, "idx")
    _check_sizes({path: sidecar.idx_bytes})
    return _parse_index(path.read_bytes(), path, sidecar)


def read_sidecar(path_stem: Path) -> Sidecar:
    """Reads the sidecar alone, which exists only if both binary files were written whole.

    Raises:
        ArtifactError: It is missing, torn or contradicts itself.
    """
    path = file_of(path_stem, "json")
    if not path.is_file():
        raise ArtifactError(f"{path}: no such sidecar, so these documents were not finished; {_REMEDY}")
    try:
        sidecar = Sidecar.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path}: field `{name}`: {first['msg']}; {_REMEDY}") from error
    _expect(path, "version", sidecar.version, _SIDECAR_VERSION)
    if sidecar.dtype not in _DTYPE_CODES:
        raise ArtifactError(f"{path}: dtype {sidecar.dtype!r} is none of {', '.join(_DTYPE_CODES)}; {_REMEDY}")
    if not 0 <= sidecar.largest_id < sidecar.vocab_size:
        raise ArtifactError(
            f"{path}: largest id {sidecar.largest_id} is outside of the vocabulary of {sidecar.vocab_size}; {_REMEDY}"
        )
    return sidecar


def _check_sizes(expected: Mapping[Path, int]) -> None:
    for path, size in expected.items():
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file, but its sidecar exists; {_REMEDY}")
        _expect(path, "size in bytes", path.stat().st_size, size)


def _parse_index(index: bytes, path: Path, sidecar: Sidecar) -> NDArray[np.int64]:
    """Checks an index against its sidecar and returns the document lengths."""
    count = sidecar.documents
    _expect(path, "size in bytes by its document count", len(index), _HEADER.size + 12 * count + 8 * (count + 1))
    magic, version, code, sequences, documents = _HEADER.unpack_from(index)
    _expect(path, "magic", magic, _MAGIC)
    _expect(path, "format version", version, _FORMAT_VERSION)
    _expect(path, "dtype code", code, _DTYPE_CODES[sidecar.dtype])
    _expect(path, "number of sequences", sequences, count)
    _expect(path, "number of documents", documents - 1, count)
    lengths = np.frombuffer(index, "<i4", count, _HEADER.size).astype(np.int64)
    pointers = np.frombuffer(index, "<i8", count, _HEADER.size + 4 * count)
    bounds = np.frombuffer(index, "<i8", count + 1, _HEADER.size + 12 * count)
    if lengths.min() < 0:
        raise ArtifactError(f"{path}: document {int(lengths.argmin())} has length {int(lengths.min())}; {_REMEDY}")
    _expect(path, "number of tokens", int(lengths.sum()), sidecar.tokens)
    _expect(path, "tokens by the size of .bin", sidecar.bin_bytes, sidecar.tokens * np.dtype(sidecar.dtype).itemsize)
    _expect_array(path, "pointer", pointers, _pointers(lengths, sidecar.dtype))
    _expect_array(path, "first sequence", bounds, np.arange(count + 1))
    lengths.flags.writeable = False
    return lengths


def _expect_array(path: Path, name: str, found: NDArray[np.int64], expected: NDArray[np.int64]) -> None:
    wrong = np.flatnonzero(found != expected)
    if wrong.size:
        first = int(wrong[0])
        _expect(path, f"{name} of document {first}", int(found[first]), int(expected[first]))


def _expect(path: Path, name: str, found: object, expected: object) -> None:
    if found != expected:
        raise ArtifactError(f"{path}: {name} is {found}, expected {expected}; {_REMEDY}")
