"""Others' writer makes the same bytes, and others' reader reads them: `pip install 'megatron_tspin[oracles]'`."""

import random
from pathlib import Path

import pytest

from megatron_tspin.data.indexed import write_documents
from megatron_tspin.run_folder import file_of

DOCUMENTS = [[random.Random(n).randrange(60_000) for _ in range(n % 7)] for n in range(50)]


@pytest.mark.parametrize(("vocab_size", "token_size"), [(65_536, 2), (65_537, 4)])
def test_datatrove_writes_the_same_bytes(tmp_path: Path, vocab_size: int, token_size: int) -> None:
    datatrove = pytest.importorskip("datatrove.pipeline.tokens.megatron_tokenizer")
    theirs = datatrove.MegatronTokenizedFile(str(tmp_path), "theirs", token_size=token_size)
    for document in DOCUMENTS:
        theirs.write(document)
    theirs.close()
    write_documents(tmp_path / "ours", DOCUMENTS, vocab_size, {})
    for kind in ("bin", "idx"):
        assert file_of(tmp_path / "ours", kind).read_bytes() == (tmp_path / f"theirs.{kind}").read_bytes()


@pytest.mark.parametrize("vocab_size", [65_536, 65_537])
def test_megatron_tokenizer_lite_reads_them(tmp_path: Path, vocab_size: int) -> None:
    lite = pytest.importorskip("megatron_tokenizer_lite.indexed_dataset")
    write_documents(tmp_path / "ours", DOCUMENTS, vocab_size, {})
    reader = lite.make_dataset(str(tmp_path / "ours_document"))
    assert [reader[index].tolist() for index in range(len(reader))] == DOCUMENTS
