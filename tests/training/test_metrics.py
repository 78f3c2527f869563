"""From sums to a line a step, and a writer that continues where a checkpoint stands."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tspin.objective.forward import SUMMED
from megatron_tspin.objective.roles import ROLES
from megatron_tspin.records import StepMetrics
from megatron_tspin.training.metrics import MetricsWriter, step_metrics

MEASURED = {
    "iteration": 1, "step": 3, "learning_rate": 1e-6, "grad_norm": 0.5, "update_skipped": False, "seconds": 2.0,
}  # fmt: skip


def sums() -> torch.Tensor:
    """Four triplets; every other quantity sums to ten times its place."""
    values = torch.arange(len(SUMMED), dtype=torch.float64) * 10
    values[SUMMED.index("num_triplets")] = 4
    return values


def mean(name: str) -> float:
    return SUMMED.index(name) * 10 / 4


DIAGNOSED = [f"{quantity}_{role}" for quantity in ("entropy", "top") for role in ROLES]
RATIOS = ["tokens", "places", "used", "prompt_tokens", "prompt_places"]


def metrics(step: int) -> StepMetrics:
    return step_metrics(sums(), ("annotated", "synthetic"), {**MEASURED, "step": step})


def test_means_over_triplets() -> None:
    found = step_metrics(sums(), ("annotated", "synthetic", "proto"), MEASURED)
    names = [name for name in SUMMED if name not in ("num_triplets", "teaching", *RATIOS, *DIAGNOSED)]
    assert {name: getattr(found, name) for name in names} == {name: mean(name) for name in names}
    assert found.num_triplets == 4
    assert found.tokens_per_second == SUMMED.index("tokens") * 10 / 2.0
    assert found.packing_efficiency == SUMMED.index("used") / SUMMED.index("places")
    assert found.prompt_share_saved == 1 - SUMMED.index("prompt_places") / SUMMED.index("prompt_tokens")
    assert [getattr(found, name) for name in DIAGNOSED] == [None] * 6, "nothing was measured"
    assert {key: getattr(found, key) for key in MEASURED} == MEASURED


@pytest.mark.parametrize("roles", [ROLES, ROLES[:2], ROLES[:1]], ids=len)
def test_diagnostics_are_means_over_response_tokens(roles: tuple[str, ...]) -> None:
    found = step_metrics(sums(), roles, MEASURED, diagnostics=True)
    for role in ROLES:
        tokens = SUMMED.index(f"tokens_{role}")
        for quantity in ("entropy", "top"):
            name = f"{quantity}_{role}"
            assert getattr(found, name) == (SUMMED.index(name) / tokens if role in roles else None)


@pytest.mark.parametrize(
    ("roles", "absent"),
    [
        (("annotated", "synthetic"), ["log_prob_proto", "reward_proto", "tokens_proto", "historical_advantage"]),
        (
            ("annotated",),
            ["log_prob_synthetic", "tokens_proto", "current_advantage", "active_share", "identical_share"],
        ),
    ],
)
def test_what_was_not_computed_is_none(roles: tuple[str, ...], absent: list[str]) -> None:
    found = step_metrics(sums(), roles, MEASURED)
    assert [getattr(found, name) for name in absent] == [None] * len(absent)
    assert found.log_prob_annotated == mean("log_prob_annotated")


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
