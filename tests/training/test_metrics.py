"""A writer of steps that continues where a checkpoint stands."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.training.metrics import MetricsWriter
from tests.step_metrics import mean, metrics


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write(path: Path, done: int, last: int, tensorboard: Path | None = None) -> None:
    writer = MetricsWriter(path, done, tensorboard)
    for step in range(done + 1, last + 1):
        writer.write(metrics(step))
    writer.close()


def test_a_fresh_writer_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "iteration_000" / "metrics.jsonl"
    write(path, 0, 3)
    assert steps_in(path) == [1, 2, 3]
    write(path, 0, 2)
    assert steps_in(path) == [1, 2]


def test_lines_beyond_the_checkpoint_are_made_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 5)
    before = path.read_bytes()
    write(path, 3, 5)
    assert path.read_bytes() == before


@pytest.mark.parametrize("tail", [b'{"iteration": 1, "st', b"\xff\xfe", b"{}\n", b'{"step": 5}\n', b"[]\n"])
def test_a_torn_line_is_dropped(tail: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 4)
    path.write_bytes(path.read_bytes() + tail)
    write(path, 4, 6)
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]


def test_lost_lines_do_not_stop_a_run(tmp_path: Path, caplog: Any) -> None:
    """The checkpoint is on the disk, the metrics of its last steps are not: a power failure."""
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 2)
    path.write_bytes(path.read_bytes() + b'{"iteration": 1, "st')
    with caplog.at_level("WARNING", logger="megatron_tspin"):
        write(path, 4, 5)
    assert steps_in(path) == [1, 2, 5]
    assert "metrics.jsonl:3" in caplog.text and "steps 3 to 4 are lost" in caplog.text


def test_what_was_measured_before_the_first_step_is_step_0(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, events = tmp_path / "metrics.jsonl", tmp_path / "tensorboard"
    for folder in (events, None):
        writer = MetricsWriter(path, 0, folder)
        writer.write_start({"precision/drift": 0.25})
        writer.write(metrics(1))
        writer.close()
        assert steps_in(path) == [1]
    write(path, 1, 2, events)
    found = EventAccumulator(str(events))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("precision/drift")] == [(0, 0.25)]
    assert [event.step for event in found.Scalars("loss")] == [1, 2]


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = tmp_path / "tensorboard"
    write(tmp_path / "metrics.jsonl", 0, 3, events)
    found = EventAccumulator(str(events))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3]
    assert found.Scalars("loss")[0].value == pytest.approx(mean("loss"))
    assert "log_prob_proto" not in found.Tags()["scalars"]
    write(tmp_path / "metrics.jsonl", 2, 3, events)
    again = EventAccumulator(str(events))
    again.Reload()
    assert [event.step for event in again.Scalars("loss")] == [1, 2, 3], "the step after the checkpoint counts once"
