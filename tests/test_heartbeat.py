"""What a rank says of itself while it works."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_tspin import heartbeat
from megatron_tspin.heartbeat import beat, beat_file, busy, read_beats, start_beating, waiting
from megatron_tspin.log import progress_bar, track


@pytest.fixture(autouse=True)
def silent_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(heartbeat, "_heart", None)
    monkeypatch.setattr(heartbeat.faulthandler, "register", lambda *_, **__: None)
    yield


def now(folder: Path) -> tuple[str, str]:
    (only,) = read_beats(folder)
    assert (only.rank, only.pid) == (3, os.getpid())
    return only.doing, only.kind


def test_without_a_driver_nothing_is_written(tmp_path: Path) -> None:
    beat("step 1")
    with busy("reading"):
        pass
    assert read_beats(tmp_path) == []


def test_every_beat_is_another_one(tmp_path: Path) -> None:
    start_beating(tmp_path, 3)
    assert now(tmp_path) == ("starting", "busy")
    counts = []
    for doing in ("step 1", None, "step 2"):
        beat(doing)
        counts += [found.count for found in read_beats(tmp_path)]
    assert counts == sorted(set(counts)) and len(counts) == 3
    assert now(tmp_path) == ("step 2", "step")
    assert beat_file(tmp_path, 3).stat().st_size == 512


def test_a_rank_returns_to_where_it_was(tmp_path: Path) -> None:
    start_beating(tmp_path, 3)
    beat("step 7")
    with busy("writing"):
        assert now(tmp_path) == ("writing", "busy")
        with waiting("waiting for rank 0"):
            assert now(tmp_path) == ("waiting for rank 0", "waiting")
        assert now(tmp_path) == ("writing", "busy")
    assert now(tmp_path) == ("step 7", "step")


def test_a_rank_that_failed_stays_where_it_was(tmp_path: Path) -> None:
    start_beating(tmp_path, 3)
    with pytest.raises(ValueError, match="torn"), busy("reading"):
        raise ValueError("torn")
    assert now(tmp_path) == ("reading", "busy")


def test_what_people_see_move_beats(tmp_path: Path) -> None:
    start_beating(tmp_path, 3)
    for speak in (True, False):
        before = read_beats(tmp_path)[0].count
        with progress_bar("score", 4, "response", speak) as bar:
            assert now(tmp_path) == ("score", "step")
            bar.update(2)
            bar.update(2)
        assert read_beats(tmp_path)[0].count == before + 3
    assert list(track([1, 2], "convert", 2, "tensor")) == [1, 2]
    assert now(tmp_path) == ("convert", "step")


def test_long_names_are_cut(tmp_path: Path) -> None:
    start_beating(tmp_path, 3)
    beat("scoring the answer to " + "ü" * 1000)
    assert now(tmp_path)[0].startswith("scoring the answer to ü") and beat_file(tmp_path, 3).stat().st_size == 512


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    start_beating(tmp_path / "file" / "ranks", 3)
    assert "the driver will not notice if this rank hangs" in capsys.readouterr().err
    beat("step 1")


def test_a_beat_caught_in_the_middle_is_passed_over(tmp_path: Path) -> None:
    start_beating(tmp_path, 3)
    beat_file(tmp_path, 4).write_text('{"rank": 4, "pi')
    beat_file(tmp_path, 5).write_text("{}")
    assert [found.rank for found in read_beats(tmp_path)] == [3]
