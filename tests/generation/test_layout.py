"""The pipeline of training is folded into replicas where a policy fits a rank's memory."""

from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import Config, ParallelSection
from megatron_tspin.generation import layout
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.models.sizes import num_parameters


@pytest.mark.parametrize(("bf16", "tp"), [(False, 1), (True, 1), (False, 2)])
def test_what_a_rank_can_hold_decides(bf16: bool, tp: int, tiny_checkpoint: Any, monkeypatch: Any) -> None:
    folder: Path = tiny_checkpoint("tied")
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": 2}
    given = {"run_dir": "run", "model": {"hf_checkpoint": str(folder)}, "data": {"annotated": "x.jsonl"}}
    config = Config.model_validate({**given, "parallel": sizes, "precision": {"bf16": bf16}})
    needed = num_parameters(read_architecture(folder)) * (2 if bf16 else 4) / tp
    for memory, expected in ((needed / 0.59, (1, 2)), (needed / 0.61, (2, 1))):
        monkeypatch.setattr(layout, "_memory_bytes", lambda memory=memory: memory)
        found = layout.generation_layout(config)
        assert (found.pipeline_model_parallel_size, found.data_parallel_size) == expected
        assert found.world_size == config.parallel.world_size


def test_what_was_asked_for_stays(tiny_checkpoint: Any) -> None:
    given: dict[str, Any] = {"run_dir": "run", "model": {"hf_checkpoint": "nowhere"}, "data": {"annotated": "x.jsonl"}}
    given |= {"parallel": {"pipeline_model_parallel_size": 2}, "generation": {"pipeline_model_parallel_size": 2}}
    found = layout.generation_layout(Config.model_validate(given))
    assert found == ParallelSection(pipeline_model_parallel_size=2)
