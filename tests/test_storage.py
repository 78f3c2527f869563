"""Files that are read whole: what they may begin with, and what is refused by name."""

from pathlib import Path

import pytest

from megatron_tspin.errors import InputError
from megatron_tspin.storage import read_json, read_text


def written(folder: Path, content: bytes) -> Path:
    path = folder / "file.json"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_changes_nothing(mark: bytes, tmp_path: Path) -> None:
    assert read_json(written(tmp_path, mark + '{"ä": [1, {"ä": 2}]}'.encode())) == {"ä": [1, {"ä": 2}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"rope_theta": 1, "b": 2, "rope_theta": 3}', "the key `rope_theta` stands in one object twice"),
        (b'[{"a": {"b": 1, "b": 1}}]', "the key `b` stands in one object twice"),
        (b'{"a": 1', "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\xff"}', "not valid UTF-8 at byte 7"),
        ('{"a": 1}'.encode("utf-16"), "not valid UTF-8 at byte 0"),
    ],
)
def test_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(InputError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent" / "below"):
        with pytest.raises(InputError, match="no such file"):
            read_text(path)
