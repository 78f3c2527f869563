"""Whatever the format of a file, every reader finds the same examples in it."""

import datetime
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.data.annotated import Example
from megatron_tspin.data.sources import MOST_LINE_BYTES, count_rows, example_files, source_digest
from megatron_tspin.data.user_examples import iterate_annotated, read_annotated, read_prompts, read_scored
from megatron_tspin.errors import InputError

RECORDS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "Ünï\n1?", "response": "1", "gold": [1, None]},
    {"id": "b", "prompt": "2?", "response": "2", "gold": []},
    {"id": "c", "prompt": "3?", "response": "3", "gold": None},
]
READERS: dict[str, Callable[[Path], list[Any]]] = {
    "annotated": read_annotated,
    "prompts": read_prompts,
    "scored": lambda path: read_scored(path, 100),
}


def as_jsonl(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_gzip(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_bytes(gzip.compress(as_jsonl(records)))


def write_gzip_in_members(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_bytes(b"".join(gzip.compress(as_jsonl([record])) for record in records))


def write_zstd(path: Path, records: list[dict[str, Any]]) -> None:
    zstandard = pytest.importorskip("zstandard")
    path.write_bytes(zstandard.ZstdCompressor().compress(as_jsonl(records)))


def write_zstd_in_frames(path: Path, records: list[dict[str, Any]]) -> None:
    zstandard = pytest.importorskip("zstandard")
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(as_jsonl([record])) for record in records))


def write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(records), path, row_group_size=2)


def write_saved(path: Path, records: list[dict[str, Any]]) -> None:
    """As `datasets.Dataset.save_to_disk` leaves it, in two files."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(records)
    path.mkdir()
    names = [f"data-0000{number}-of-00002.arrow" for number in (0, 1)]
    for name, part in zip(names, (table.slice(0, 2), table.slice(2)), strict=True):
        with pyarrow.ipc.new_stream(str(path / name), table.schema) as stream:
            stream.write_table(part)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (path / "state.json").write_text(json.dumps(state))


def write_hub_folder(path: Path, records: list[dict[str, Any]]) -> None:
    (path / "data").mkdir(parents=True)
    write_parquet(path / "data" / "train-00000-of-00002.parquet", records[:1])
    write_parquet(path / "data" / "train-00001-of-00002.parquet", records[1:])


WRITERS = {
    writer.__name__.removeprefix("write_"): writer
    for writer in (
        write_gzip,
        write_gzip_in_members,
        write_zstd,
        write_zstd_in_frames,
        write_parquet,
        write_saved,
        write_hub_folder,
    )
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", WRITERS)
def test_the_same_examples_in_every_format(tmp_path: Path, form: str, reader: str) -> None:
    (tmp_path / "plain.jsonl").write_bytes(as_jsonl(RECORDS))
    WRITERS[form](tmp_path / "other", RECORDS)
    read = READERS[reader]
    assert read(tmp_path / "other") == read(tmp_path / "plain.jsonl")
    assert count_rows(tmp_path / "other") == len(RECORDS)


@pytest.mark.parametrize(("form", "place"), [("gzip", ":2"), ("zstd", ":2"), ("parquet", ": row 2")])
def test_a_bad_row_is_named_with_its_place(tmp_path: Path, form: str, place: str) -> None:
    WRITERS[form](tmp_path / "x", [RECORDS[0], {**RECORDS[1], "response": ""}, {**RECORDS[2], "id": "a"}])
    with pytest.raises(InputError) as caught:
        read_annotated(tmp_path / "x")
    other = "line 1" if place == ":2" else "row 1"
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'x'}{place}: `response` is empty",
        f"{tmp_path / 'x'}{place.replace('2', '3')}: id 'a' is already used in {other}",
    ]


def test_rows_are_counted_on_over_files_and_placed_in_their_own(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_bytes(b'\n{"prompt": "%s", "response": "r"}\n' % name.encode())
    found = list(iterate_annotated(tmp_path / "*.jsonl"))
    assert [(each.item.id, each.item.prompt, each.place) for each in found] == [
        ("2", "a", f"{tmp_path / 'a.jsonl'}:2"),
        ("4", "b", f"{tmp_path / 'b.jsonl'}:2"),
    ]
    before = source_digest(tmp_path / "*.jsonl")
    (tmp_path / "b.jsonl").write_bytes(as_jsonl(RECORDS))
    assert source_digest(tmp_path / "*.jsonl") != before


@pytest.mark.parametrize("form", ["gzip", "zstd", "parquet", "saved"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_file_that_was_cut_off_is_no_shorter_file(tmp_path: Path, form: str, kept: float) -> None:
    records = [{"prompt": f"{number}" * 50, "response": str(number**7)} for number in range(3000)]
    WRITERS[form](tmp_path / "x", records)
    path = example_files(tmp_path / "x")[0]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(InputError, match=rf"{path}: .*(cut off|cannot be read|unexpected|too small|Expected)"):
        read_annotated(tmp_path / "x")


@pytest.mark.parametrize(
    ("package", "form", "message"),
    [
        ("zstandard", "zstd", "is compressed with zstd, which zstandard reads: pip install zstandard"),
        ("pyarrow", "parquet", "is a Parquet file, which pyarrow reads: pip install pyarrow"),
        ("pyarrow", "saved", "is an Arrow file of `datasets`, which pyarrow reads: pip install pyarrow"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, form: str, message: str
) -> None:
    WRITERS[form](tmp_path / "x", RECORDS)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=message):
        read_annotated(tmp_path / "x")


def test_a_folder_of_several_splits_is_refused_with_what_to_write(tmp_path: Path) -> None:
    write_hub_folder(tmp_path / "hub", RECORDS)
    write_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", RECORDS)
    with pytest.raises(InputError, match="holds test, train; name the files .* with a pattern, as '.*/test"):
        read_annotated(tmp_path / "hub")
    assert len(read_annotated(tmp_path / "hub" / "data" / "train-*.parquet")) == 3
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match="holds the splits train, test; name one of them, as .*/saved/train"):
        read_annotated(tmp_path / "saved")
    with pytest.raises(InputError, match="no such file of examples: nothing matches the pattern"):
        read_annotated(tmp_path / "*.nothing")


def test_what_json_has_no_word_for_does_not_keep_an_example_from_being_read(tmp_path: Path) -> None:
    day = datetime.datetime(2026, 1, 31, 12)
    odd = {"prompt": "p", "response": "r", "image": b"\xff", "day": day, "score": float("nan"), "deep": {"x": [b"1"]}}
    write_parquet(tmp_path / "x", [odd])
    (found,) = read_annotated(tmp_path / "x")
    assert found.record == {
        "prompt": "p", "response": "r", "image": None, "day": "2026-01-31T12:00:00", "score": None,
        "deep": {"x": [None]},
    }  # fmt: skip
    assert Example.model_validate_json(found.line()) == found


def test_a_row_of_a_table_is_measured_too(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x", [{"prompt": "p", "response": "a" * MOST_LINE_BYTES}])
    with pytest.raises(InputError, match="x: row 1: 4194305 characters, which is more than a million tokens"):
        read_annotated(tmp_path / "x")


def test_datasets_saves_what_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(RECORDS)
    data.save_to_disk(tmp_path / "whole", num_shards=2)
    data.select([2, 0]).save_to_disk(tmp_path / "chosen")
    assert [example.id for example in read_annotated(tmp_path / "whole")] == ["a", "b", "c"]
    assert [example.id for example in read_annotated(tmp_path / "chosen")] == ["c", "a"]
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "both")
    with pytest.raises(InputError, match="name one of them"):
        read_annotated(tmp_path / "both")
    assert len(read_annotated(tmp_path / "both" / "test")) == 3
