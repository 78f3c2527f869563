"""Time is attributed to the part of the model that an operation belongs to."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.step_profile import by_part, main
from megatron_tspin.errors import EXIT_OK


def event(name: str, microseconds: float, parent: Any = None) -> Any:
    return SimpleNamespace(name=name, self_cpu_time_total=microseconds, cpu_parent=parent)


def test_operations_count_for_the_part_they_are_called_from() -> None:
    head = event("_SequenceLogProbsBackward", 1e6)
    inner = event("aten::addmm_", 4e6, event("aten::anything", 0.0, head))
    layer = event("aten::mm", 3e6, event("LinearBackward", 1e6))
    rest = [event(f"aten::small_{i}", 1e5) for i in range(10)]
    found = {part.name: part for part in by_part([head, inner, layer, layer.cpu_parent, *rest])}
    assert found["head"].seconds == pytest.approx(5.0)
    assert found["linear layers (matrix products)"].seconds == pytest.approx(3.0)
    assert found["autograd and Python"].seconds == pytest.approx(1.0)
    assert found["all other operations"].seconds == pytest.approx(0.4)  # six of ten keep their names
    assert sum(part.share for part in found.values()) == pytest.approx(1.0)


@pytest.mark.processes
def test_a_profile_of_the_tiny_model(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--max-length", "48", "--triplets", "3", "--threads", "1", "--output", str(tmp_path)]
    assert main(["--model", str(tiny_checkpoint("tied")), *flags]) == EXIT_OK
    tree = json.loads((tmp_path / "profile_tied_ultrachat_48.json").read_text())
    parts = {part["name"]: part["seconds"] for part in tree["parts"]}
    assert {"head", "attention over the packed row", "SwiGLU", "linear layers (matrix products)"} <= set(parts)
    assert all(seconds >= 0 for seconds in parts.values()) and tree["seconds"] > 0
    assert "GFLOP/s of a matrix product" in capfd.readouterr().out
