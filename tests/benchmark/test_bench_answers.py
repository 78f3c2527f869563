"""`tspin bench generate` on a tiny policy: both engines answer, and the numbers drawn from it are right."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.benchmark.answers.measure import run_answer_benchmark
from megatron_tspin.benchmark.answers.output import print_result, write_result
from megatron_tspin.benchmark.answers.prompts import read_questions
from megatron_tspin.benchmark.answers.results import AnswerResult, Measurement, needed_flops
from megatron_tspin.benchmark.answers.settings import (
    HEADLINE,
    OURS,
    TRANSFORMERS,
    AnswerSettings,
    Workload,
    random_prompts,
    workloads,
)
from megatron_tspin.errors import InputError
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.models.sizes import attention_flops, head_flops, layer_flops

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


def settings(folder: Path, **changes: Any) -> AnswerSettings:
    given = {"workloads": (Workload(2, 3, ends=False),), "engines": (OURS, TRANSFORMERS), "new_tokens": 4, "rounds": 1}
    return AnswerSettings(model=str(folder), prompts=PROMPTS, threads=1, **{**given, **changes})


@pytest.mark.processes
def test_both_engines_answer(tiny_checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_answer_benchmark(settings(tiny_checkpoint("tied")))
    assert not result.failures((OURS, TRANSFORMERS))
    for engine in result.engines.values():
        (measured,) = engine.measurements
        assert measured.tokens == [4, 4, 4] and measured.seconds > 0
    assert result.headline() is None, "a batch of 64 was not measured"
    written = json.loads(write_result(result, tmp_path).read_text())
    assert [each["engine"] for each in written["results"]] == [OURS, TRANSFORMERS]
    assert "plotly" in next(tmp_path.glob("*.html")).read_text()
    print_result(result)
    assert "batch 2, all of one length" in capsys.readouterr().out


@pytest.mark.processes
def test_an_engine_that_fails_is_named(tmp_path: Path) -> None:
    result = run_answer_benchmark(settings(tmp_path, engines=(TRANSFORMERS,)))
    (problem,) = result.failures((OURS, TRANSFORMERS))
    assert problem.startswith("batch 2, all of one length, transformers: ")


def test_the_headline_is_the_ratio_of_medians(tmp_path: Path) -> None:
    result = AnswerResult(settings(tmp_path), {})
    for name, seconds in ((OURS, (1.0, 2.0, 10.0)), (TRANSFORMERS, (4.0, 6.0, 5.0))):
        found = [Measurement([60, 40], each, each, 1.0, 1.0) for each in seconds]
        result.engine(HEADLINE, name).measurements += found
    assert result.headline() == "speedup over transformers.generate: 2.50"


def test_operations_that_answers_need(tiny_checkpoint: Any) -> None:
    architecture = read_architecture(tiny_checkpoint("tied"))
    layers, head, pair = layer_flops(architecture), head_flops(architecture), attention_flops(architecture)
    # 3 + 2 - 1 and 1 + 1 - 1 tokens go through the layers, 2 + 1 positions through the head, 1 + 2 + 3 + 4 + 1 pairs
    expected = 5 * layers + 3 * head + 11 * pair
    assert needed_flops(architecture.folder, PROMPTS[:2], [2, 1]) == pytest.approx(expected)


def test_workloads() -> None:
    assert workloads(quick=True) == (HEADLINE,)
    assert HEADLINE in workloads(quick=False) and len(set(workloads(quick=False))) == 6


def test_prompts(tiny_checkpoint: Any, tmp_path: Path) -> None:
    architecture = read_architecture(tiny_checkpoint("tied"))
    found = random_prompts(architecture, 0)
    assert len(found) == 64 and found == random_prompts(architecture, 0)
    assert all(0 <= token < architecture.vocab_size for prompt in found for token in prompt)
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "?"}\n')
    with pytest.raises((InputError, OSError)):
        read_questions(architecture, path)
