import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_tspin.data import indexed
from megatron_tspin.data.indexed import open_documents, read_sidecar, write_documents
from megatron_tspin.errors import ArtifactError, InputError
from megatron_tspin.run_folder import file_of

DOCUMENTS = [[1, 2, 3], [], [7], [5, 6, 70]]
HEADER = 34
NUM = len(DOCUMENTS)


@pytest.fixture
def stem(tmp_path: Path) -> Path:
    write_documents(tmp_path / "train_prompt", DOCUMENTS, 100, {"tokenizer_fingerprint": "f"})
    return tmp_path / "train_prompt"


def rewrite_sidecar(stem: Path, **changes: Any) -> None:
    path = file_of(stem, "json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def patch(path: Path, offset: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)


def test_what_was_written_is_read(stem: Path) -> None:
    documents = open_documents(stem)
    assert [documents[i] for i in range(len(documents))] == DOCUMENTS
    assert list(documents) == DOCUMENTS
    assert documents.lengths.tolist() == [3, 0, 1, 3]
    assert documents.facts == {"tokenizer_fingerprint": "f"}
    for index in (-1, NUM):
        with pytest.raises(IndexError):
            documents[index]


def test_rows_outlive_their_data_set(stem: Path) -> None:
    documents = open_documents(stem)
    row, lengths = documents[3], documents.lengths
    del documents
    assert row == [5, 6, 70] and lengths.sum() == 7
    assert all(type(token) is int for token in row)


ids = st.lists(st.integers(0, 99_999), max_size=6)


@settings(deadline=None)  # the machines of CI are shared
@given(st.lists(ids, min_size=1, max_size=8).filter(any), st.sampled_from([65_535, 65_536, 65_537, 100_000]))
def test_megatron_core_reads_the_same_tokens_from_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocab_size: int
) -> None:
    documents = [[token % vocab_size for token in document] for document in documents]
    folder = tmp_path_factory.mktemp("x")
    write_documents(folder / "ours", documents, vocab_size, {})
    reader = IndexedDataset(str(folder / "ours_document"), mmap=True)
    assert [reader[i].tolist() for i in range(len(reader))] == documents
    assert reader.document_indices.tolist() == list(range(len(documents) + 1))
    assert list(open_documents(folder / "ours")) == documents

    dtype = np.uint16 if vocab_size <= 65_536 else np.int32
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(str(folder / "theirs.idx"))
    for kind in ("bin", "idx"):
        assert file_of(folder / "ours", kind).read_bytes() == (folder / f"theirs.{kind}").read_bytes()


@pytest.mark.parametrize("vocab_size", [100, 65_536, 70_000])
@pytest.mark.parametrize("wrong", [-1, 0])
def test_ids_outside_of_the_vocabulary_are_refused(tmp_path: Path, vocab_size: int, wrong: int) -> None:
    token = wrong if wrong < 0 else vocab_size
    with pytest.raises(InputError, match=f"document 1 has token id {token}, .* vocabulary of {vocab_size}"):
        write_documents(tmp_path / "x", [[1], [2, token]], vocab_size, {})
    assert not file_of(tmp_path / "x", "bin").exists()
    assert not file_of(tmp_path / "x", "json").exists()


@pytest.mark.parametrize("document", [[1.5], [[1]], ["1"], [2**70]])
def test_what_is_no_list_of_ids_is_refused(tmp_path: Path, document: Any) -> None:
    with pytest.raises(InputError, match="document 0"):
        write_documents(tmp_path / "x", [document], 100, {})


@pytest.mark.parametrize("documents", [[], [[]]])
def test_data_sets_without_a_token_are_refused(tmp_path: Path, documents: list[list[int]]) -> None:
    with pytest.raises(InputError, match="without a single token"):
        write_documents(tmp_path / "x", documents, 100, {})


def test_a_writer_that_fails_leaves_the_old_files_as_they_were(stem: Path) -> None:
    before = {path.name: path.read_bytes() for path in stem.parent.iterdir()}
    with pytest.raises(InputError):
        write_documents(stem, [[1], [100]], 100, {})
    assert {path.name: path.read_bytes() for path in stem.parent.iterdir()} == before
    assert list(open_documents(stem)) == DOCUMENTS


def test_a_writer_that_ends_between_two_files_leaves_no_sidecar_that_vouches(
    stem: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "_index_bytes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_documents(stem, [[1], [2]], 100, {})
    with pytest.raises(ArtifactError, match="no such sidecar"):
        open_documents(stem)


def truncate(kind: str, size: int) -> Callable[[Path], None]:
    def apply(stem: Path) -> None:
        path = file_of(stem, kind)
        path.write_bytes(path.read_bytes()[:size])

    return apply


def poke(kind: str, offset: int, value: bytes) -> Callable[[Path], None]:
    return lambda stem: patch(file_of(stem, kind), offset, value)


def swap_bin(stem: Path) -> None:
    other = stem.with_name("other")
    write_documents(other, [[9] * len(document) for document in DOCUMENTS], 100, {})
    file_of(stem, "bin").write_bytes(file_of(other, "bin").read_bytes())


LENGTHS, POINTERS, BOUNDS = HEADER, HEADER + 4 * NUM, HEADER + 12 * NUM


@pytest.mark.parametrize(
    ("damage", "kind", "expected"),
    [
        (truncate("bin", 0), "bin", "size in bytes is 0, expected 14"),
        (truncate("bin", 12), "bin", "size in bytes is 12, expected 14"),
        (truncate("idx", 20), "idx", "size in bytes is 20, expected"),
        (truncate("json", 20), "json", "not valid JSON"),
        (lambda stem: file_of(stem, "bin").unlink(), "bin", "no such file"),
        (lambda stem: file_of(stem, "idx").unlink(), "idx", "no such file"),
        (lambda stem: file_of(stem, "json").unlink(), "json", "no such sidecar"),
        (poke("bin", 3, b"\x01"), "bin", "SHA-256 is"),
        (swap_bin, "bin", "SHA-256 is"),
        (poke("idx", 0, b"X"), "idx", "magic is"),
        (poke("idx", 9, b"\x02"), "idx", "format version is 2, expected 1"),
        (poke("idx", 17, b"\x04"), "idx", "dtype code is 4, expected 8"),
        (poke("idx", 18, b"\x05"), "idx", "number of sequences is 5, expected 4"),
        (poke("idx", 26, b"\x09"), "idx", "number of documents is 8, expected 4"),
        (poke("idx", LENGTHS, struct.pack("<i", -1)), "idx", "document 0 has length -1"),
        (poke("idx", LENGTHS, struct.pack("<i", 4)), "idx", "number of tokens is 8, expected 7"),
        (poke("idx", LENGTHS, struct.pack("<ii", 2, 1)), "idx", "pointer of document 1 is 6, expected 4"),
        (poke("idx", POINTERS + 24, struct.pack("<q", 1 << 40)), "idx", "pointer of document 3 is 1099511627776"),
        (poke("idx", BOUNDS + 8, struct.pack("<q", 2)), "idx", "first sequence of document 1 is 2, expected 1"),
        (lambda stem: rewrite_sidecar(stem, dtype="int32"), "idx", "dtype code is 8, expected 4"),
        (lambda stem: rewrite_sidecar(stem, dtype="float32"), "json", "dtype 'float32'"),
        (lambda stem: rewrite_sidecar(stem, vocab_size=70), "json", "largest id 70 .* vocabulary of 70"),
        (lambda stem: rewrite_sidecar(stem, largest_id=71), "bin", "largest id is 70, expected 71"),
        (lambda stem: rewrite_sidecar(stem, tokens=6), "idx", "number of tokens is 7, expected 6"),
        (lambda stem: rewrite_sidecar(stem, documents=0), "json", "field `documents`"),
        (lambda stem: rewrite_sidecar(stem, documents=5), "idx", "by its document count is 122, expected"),
        (lambda stem: rewrite_sidecar(stem, version=2), "json", "version is 2, expected 1"),
        (lambda stem: rewrite_sidecar(stem, idx_sha256="0"), "idx", "SHA-256 is"),
        (lambda stem: file_of(stem, "json").write_text("{}"), "json", "field `version`"),
    ],
)
def test_damage_is_named_with_path_and_values(
    stem: Path, damage: Callable[[Path], None], kind: str, expected: str
) -> None:
    damage(stem)
    with pytest.raises(ArtifactError, match=expected) as caught:
        open_documents(stem)
    assert str(caught.value).startswith(f"{file_of(stem, kind)}: ")


@settings(deadline=None)  # the machines of CI are shared
@given(st.data())
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    stem = tmp_path_factory.mktemp("x") / "train_prompt"
    write_documents(stem, DOCUMENTS, 100, {})
    path = file_of(stem, data.draw(st.sampled_from(["bin", "idx"])))
    offset = data.draw(st.integers(0, path.stat().st_size - 1))
    patch(path, offset, bytes([path.read_bytes()[offset] ^ (1 << data.draw(st.integers(0, 7)))]))
    with pytest.raises(ArtifactError):
        open_documents(stem)


def test_the_sidecar_holds_what_was_promised(stem: Path) -> None:
    sidecar = read_sidecar(stem)
    assert (sidecar.documents, sidecar.tokens, sidecar.dtype, sidecar.largest_id) == (4, 7, "uint16", 70)
