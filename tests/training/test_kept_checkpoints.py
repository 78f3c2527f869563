"""Which checkpoints inside an iteration stay."""

from pathlib import Path

import pytest

from megatron_tspin.training.stages import keep_latest


@pytest.mark.parametrize(
    ("step", "count", "expected"),
    [
        (6, 2, ["step_00000004", "step_00000006"]),
        (6, 1, ["step_00000006"]),
        (6, 9, ["step_00000002", "step_00000004", "step_00000006"]),
        (4, 2, ["step_00000002", "step_00000004"]),
    ],
)
def test_the_latest_whole_ones_are_kept(step: int, count: int, expected: list[str], tmp_path: Path) -> None:
    """What an interrupted writer left counts for nothing, and a later step is one that was not whole."""
    for name in ("step_00000002", "step_00000004", "step_00000006", "step_00000005.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    keep_latest(tmp_path, step, count)
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


def test_none_goes_where_all_are_kept(tmp_path: Path) -> None:
    names = ["step_00000002", "step_00000004"]
    for name in names:
        (tmp_path / name).mkdir()
    keep_latest(tmp_path, 4, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
