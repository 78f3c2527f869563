"""Files that are read whole: what they may begin with, and what is refused by name."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tspin.errors import DiskFullError, InputError
from megatron_tspin.storage import is_full, read_json, read_text, write_text


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


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named_with_what_is_needed_and_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_text(path, "before")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskFullError) as caught:
        write_text(path, "ä" * 10)
    message = str(caught.value)
    assert message.startswith(f"{path}: cannot be written: No space left on device; it needs 20 bytes, ")
    assert re.search(r" \d+ are free on its disk; free some space", message) and caught.value.exit_code == 3
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.processes
def test_a_limit_on_files_is_a_full_disk(tmp_path: Path) -> None:
    """With the kernel's own refusal, which a limit on the size of files gives without being root."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from megatron_tspin.storage import write_text;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "from megatron_tspin.errors import DiskFullError\n"
        "try: write_text(Path(sys.argv[1]), 'x' * 5000)\n"
        "except DiskFullError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True)
    assert done.stdout.startswith(f"{tmp_path / 'a'}: cannot be written: File too large; it needs 5000 bytes, ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EDQUOT, "x"), True),
        (OSError(errno.EACCES, "x"), False),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("shapes differ"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=str,
)
def test_what_is_a_full_disk(error: BaseException, expected: bool) -> None:
    assert is_full(error) is expected
