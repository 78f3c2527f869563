"""Whole runs under other layouts and methods, and the commands that people use by hand on what a run left."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.data.indexed import open_documents
from megatron_tspin.records import (
    Evaluation,
    PrecisionNoise,
    ReferenceLogProbs,
    Response,
    ScoredResponse,
    read_records,
)
from megatron_tspin.step_metrics import StepMetrics
from tests.end_to_end.runs import LAYOUTS, Runs
from tests.end_to_end.small_run import CHECKPOINT, NUM_STEPS, NUM_TRAIN, sha256_of, succeed, tspin
from tests.rounding import all_within, same_updates

pytestmark = pytest.mark.processes

LAST = f"iteration_000/checkpoint/step_{NUM_STEPS:08d}"


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def metrics(run_dir: Path) -> list[StepMetrics]:
    return list(read_records(run_dir / "iteration_000" / "metrics.jsonl", StepMetrics))


def evaluation(path: Path) -> Evaluation:
    return Evaluation.model_validate_json(path.read_text())


@pytest.mark.exact
@pytest.mark.trajectory
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_the_same_policy(layout: str, runs: Runs, base_run: Path) -> None:
    run_dir = runs[layout]
    for name in ("iteration_000/train_synthetic_document", "data/train_proto_document"):
        for suffix in (".bin", ".idx"):
            assert (run_dir / (name + suffix)).read_bytes() == (base_run / (name + suffix)).read_bytes()
    expected_steps = metrics(base_run)
    assert len(expected_steps) == NUM_STEPS
    assert max(step.grad_norm for step in expected_steps) > 1  # so that a wrong norm clips wrongly
    found_steps = metrics(run_dir)
    all_within("loss", *([step.loss for step in steps] for steps in (found_steps, expected_steps)))
    all_within("norm", *([step.grad_norm for step in steps] for steps in (found_steps, expected_steps)))
    same_updates(*(weights(folder) for folder in (run_dir / "export/hf", base_run / "export/hf", CHECKPOINT)))


@pytest.mark.parametrize(
    ("method", "sampled", "reference"),
    [("sft", [], None), ("spin", ["synthetic"], True), ("tspin_ref", ["proto", "synthetic"], True)],
)
def test_a_method_writes_what_it_needs(method: str, sampled: list[str], reference: bool | None, runs: Runs) -> None:
    run_dir = runs[method]
    documents = {path.name for path in run_dir.rglob("train_*_document.bin")}
    assert documents == {f"train_{role}_document.bin" for role in ("prompt", "annotated", *sampled)}
    assert (run_dir / "iteration_000/reference.jsonl").is_file() == bool(reference)
    assert (run_dir / "proto/summary.json").is_file() == ("proto" in sampled)
    assert (run_dir / "report.html").is_file() and (run_dir / "export/hf/model.safetensors").is_file()
    steps = metrics(run_dir)
    assert len(steps) == NUM_STEPS and all(step.loss > 0 for step in steps)
    assert all((step.log_prob_synthetic is not None) == ("synthetic" in sampled) for step in steps)


def test_a_bf16_run_measures_its_noise(runs: Runs, base_run: Path) -> None:
    """Answers are sampled at temperature 0.6 and top-p 0.9, but stored with the log-probs that training scores."""
    run_dir = runs["bf16"]
    path = run_dir / "iteration_000/precision.json"
    found = PrecisionNoise.model_validate_json(path.read_text())
    assert (found.num_prompts, found.num_responses, found.historical_margin) == (12, 24, None)
    assert found.current_margin is not None and found.drift is not None and found.no_drift is None
    assert 0 < found.log_prob.mean_absolute < 0.1 and 0 < found.current_margin.noise_share < 0.1
    assert 0 < found.drift.mean_absolute < 0.1
    marker = json.loads((run_dir / "stages/train_000.json").read_text())
    assert marker["outputs"].items() >= sha256_of(run_dir, "precision.json").items()
    assert "current margin: error / median" in (run_dir / "report.html").read_text()
    assert not (base_run / "iteration_000/precision.json").exists()


def test_references_are_the_scores_of_the_starting_policy(runs: Runs, base_run: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    lines = (runs.folder / "annotated.jsonl").read_text().splitlines()  # as text, then the sampled answers as ids
    prompts = open_documents(base_run / "data/train_prompt")
    answers = open_documents(base_run / "iteration_000/train_synthetic")
    for index in range(NUM_TRAIN):
        line = {"id": f"synthetic-{index}", "prompt_ids": prompts[index], "response_ids": answers[index]}
        lines.append(json.dumps(line))
    data.write_text("\n".join(lines) + "\n")
    output, load = tmp_path / "scores.jsonl", base_run / "initial/checkpoint"
    succeed("score", "--config", base_run / "run.yaml", "--load", load, "--data", data, "--output", output)
    scores = [record.log_prob for record in read_records(output, ScoredResponse)]
    assert len(scores) == 2 * NUM_TRAIN
    as_sampled = read_all(base_run / "iteration_000/synthetic")
    assert scores[NUM_TRAIN:] == pytest.approx([sum(answer.token_log_probs) for answer in as_sampled], rel=1e-4)
    for method in ("spin", "tspin_ref"):
        found = list(read_records(runs[method] / "iteration_000/reference.jsonl", ReferenceLogProbs))
        assert [record.id for record in found] == [json.loads(line)["id"] for line in lines[:NUM_TRAIN]]
        assert [r.log_probs["annotated"] for r in found] == pytest.approx(scores[:NUM_TRAIN], rel=1e-5)
        assert [r.log_probs["synthetic"] for r in found] == pytest.approx(scores[NUM_TRAIN:], rel=1e-5)


def read_all(folder: Path) -> list[Response]:
    return [answer for path in sorted(folder.glob("shard_*.jsonl")) for answer in read_records(path, Response)]


def test_generate_by_hand(base_run: Path, runs: Runs, tmp_path: Path) -> None:
    prompts, load, output = runs.folder / "held_out.jsonl", base_run / LAST, tmp_path / "answers"
    succeed("generate", "--config", base_run / "run.yaml", "--load", load, "--prompts", prompts, "--output", output)
    answers = read_all(output)
    assert [answer.id for answer in answers] == [json.loads(line)["id"] for line in prompts.read_text().splitlines()]
    assert all(len(answer.response_ids) == len(answer.token_log_probs) <= 12 for answer in answers)
    assert any(answer.ended and answer.text for answer in answers)


def test_evaluate_by_hand(base_run: Path, runs: Runs, tmp_path: Path) -> None:
    output = tmp_path / "policy.json"
    arguments = ("--config", base_run / "run.yaml", "--load", base_run / LAST, "--iteration", 1, "--output", output)
    succeed("evaluate", *arguments)
    assert evaluation(output) == evaluation(base_run / "evaluation/policy_001.json")
    assert evaluation(output) != evaluation(base_run / "evaluation/policy_000.json")
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join((runs.folder / "held_out.jsonl").open().readlines()[:3]))
    again = tspin("evaluate", *arguments, "--held-out", fewer)
    assert again.returncode == 2 and f"{output}: exists already" in again.stderr
    other = (*arguments[:-3], 2, *arguments[-2:])  # the same policy, as if after two iterations
    succeed("evaluate", *other, "--held-out", fewer, "--overwrite")
    found = evaluation(output)
    assert found.sampled is not None and (found.iteration, found.sampled.num_prompts) == (2, 3)


def test_convert_and_export_by_hand(base_run: Path, tmp_path: Path) -> None:
    done = succeed("convert", "--hf-checkpoint", CHECKPOINT, "--save", tmp_path / "core", "--verify")
    assert "largest relative difference" in done.stderr
    succeed("export", "--load", tmp_path / "core", "--hf-checkpoint", CHECKPOINT, "--save", tmp_path / "back")
    back, source = weights(tmp_path / "back"), weights(CHECKPOINT)
    assert set(back) == set(source) and all((back[name] == source[name]).all() for name in source)
    succeed("export", "--load", base_run / LAST, "--hf-checkpoint", CHECKPOINT, "--save", tmp_path / "final")
    assert sha256_of(tmp_path / "final", "*") == sha256_of(base_run / "export/hf", "*")


def test_a_finished_run_has_nothing_to_do(base_run: Path, runs: Runs) -> None:
    before = {path: path.stat().st_mtime_ns for path in base_run.rglob("*") if path.name != ".lock"}
    done = succeed("run", "--config", runs.config("tp1"))
    assert done.stderr.count("done before") == 7
    assert {path: path.stat().st_mtime_ns for path in base_run.rglob("*") if path.name != ".lock"} == before
