"""`tspin bench iteration` on a tiny policy: both sides do both stages, and the numbers drawn from them are right."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.benchmark.answers.prompts import read_examples
from megatron_tspin.benchmark.iteration.measure import run_iteration_benchmark
from megatron_tspin.benchmark.iteration.results import IterationResult, StageMeasurement
from megatron_tspin.benchmark.iteration.settings import SIDES, STAGES, IterationSettings
from megatron_tspin.errors import InputError
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.objective.roles import ROLES

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
RESPONSES = [[3, 4], [5, 6, 7, 8], [9]]


def settings(folder: Path) -> IterationSettings:
    return IterationSettings(
        str(folder), PROMPTS, RESPONSES, new_tokens=4, batch=2, global_batch_size=2, micro_batch_size=2
    )


@pytest.mark.processes
def test_both_sides_do_both_stages(tiny_checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_iteration_benchmark(settings(tiny_checkpoint("tied")))
    tokens = sum(map(len, PROMPTS)) + len(ROLES) * sum(map(len, RESPONSES))
    for side in SIDES:
        (rollout,), (training,) = (result.measurements[side, stage] for stage in STAGES)
        assert 3 <= rollout.tokens <= 12 and training.tokens == tokens
        assert min(rollout.seconds, training.seconds) > 0
    written = json.loads(result.write(tmp_path).read_text())
    assert written["settings"]["prompts"] == [3, 1, 4] and written["settings"]["model"] == "tied"
    assert len(written["results"]) == 4
    result.show()
    assert capsys.readouterr().out.splitlines()[-1] == result.headline() == written["headline"]


def test_triplets_are_of_the_same_prompts(tmp_path: Path) -> None:
    asked = settings(tmp_path)
    assert [each.prompt for each in asked.triplets()] == PROMPTS
    assert asked.triplets()[1].responses == ([5, 6, 7, 8], [9], [3, 4])
    assert [len(batch) for batch in asked.global_batches()] == [2, 1]
    assert asked.step().max_length == 4 + 4


def test_the_headline_is_of_both_stages_together(tmp_path: Path) -> None:
    result = IterationResult(settings(tmp_path), {})
    for (side, stage), seconds in zip(
        [(side, stage) for side in SIDES for stage in STAGES], ((1.0, 3.0), (8.0,), (4.0,), (16.0,)), strict=True
    ):
        result.measurements[side, stage] += [StageMeasurement(each, each, 1.0, 1) for each in seconds]
    assert result.headline() == "speedup of an iteration: 2.00"
    assert result.speedup(STAGES[0]) == 2.0


def test_examples_without_a_response_are_refused(tiny_checkpoint: Any, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "?"}\n')
    with pytest.raises((InputError, OSError)):
        read_examples(read_architecture(tiny_checkpoint("tied")), path, 1)
