"""Reading of run directories: whole, half finished, damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tspin.errors import InputError
from megatron_tspin.report.run_data import expected_stages, load_run, weighted_mean

BuildRun = Callable[..., Path]


def test_a_finished_run_is_read_whole(build_run: BuildRun) -> None:
    run = load_run(build_run(iterations=3, steps=7))
    assert [item.index for item in run.iterations] == [0, 1, 2]
    assert [len(item.steps) for item in run.iterations] == [7, 7, 7]
    assert sorted(run.evaluations) == [0, 1, 2, 3]
    assert run.last_evaluation is not None and run.last_evaluation.iteration == 3
    assert run.proto is not None and run.iterations[1].synthetic is not None
    assert run.missing_stages() == [] and run.problems == []
    assert [stage.stage for stage in run.stages][:4] == ["tokenize", "convert", "rollout_000", "train_000"]


def test_a_run_in_the_middle_of_an_iteration(build_run: BuildRun) -> None:
    run = load_run(build_run(iterations=3, steps=8, done=1.5))
    assert [len(item.steps) for item in run.iterations] == [8, 4]
    assert run.missing_stages() == ["train_001", "rollout_002", "train_002", "rollout_003", "export"]
    assert run.problems == []


def test_a_run_that_has_only_its_config(build_run: BuildRun) -> None:
    folder = build_run(iterations=2, done=0)
    for name in ("data", "stages"):
        for path in (folder / name).iterdir():
            path.unlink()
        (folder / name).rmdir()
    run = load_run(folder)
    assert (run.iterations, run.evaluations, run.proto, run.stages, run.problems) == ([], {}, None, [], [])
    assert run.missing_stages() == expected_stages(run.config)


def test_a_folder_without_run_yaml_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory, it has no run.yaml; name the --run-dir"):
        load_run(tmp_path)


def test_a_torn_metrics_line_is_named_and_the_steps_before_it_are_kept(build_run: BuildRun) -> None:
    folder = build_run(iterations=1, steps=6)
    path = folder / "iteration_000" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]) + '{"iteration": 0, "st')
    run = load_run(folder)
    assert len(run.iterations[0].steps) == 4
    assert len(run.problems) == 1 and f"{path}:5:" in run.problems[0] and "uses the 4 steps" in run.problems[0]


def test_a_step_repeated_after_a_resume_counts_once_the_later_line_wins(build_run: BuildRun) -> None:
    folder = build_run(iterations=1, steps=4)
    path = folder / "iteration_000" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    again = [line | {"loss": 99.0} for line in lines[2:]]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *again]))
    steps = load_run(folder).iterations[0].steps
    assert [step.step for step in steps] == [1, 2, 3, 4]
    assert [step.loss == 99.0 for step in steps] == [False, False, True, True]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("evaluation/policy_001.json", "{}", "field `iteration`"),
        ("proto/summary.json", "{", "not valid JSON"),
        ("iteration_000/precision.json", '{"iteration": 0}', "field `precision`"),
        ("stages/convert.json", '{"stage": "convert"}', "field `seconds`"),
    ],
)
def test_a_broken_file_is_named_and_left_out(build_run: BuildRun, name: str, text: str, said: str) -> None:
    folder = build_run(iterations=1)
    (folder / name).write_text(text)
    run = load_run(folder)
    assert len(run.problems) == 1 and name in run.problems[0] and said in run.problems[0]
    assert sorted(run.evaluations) == ([0] if "policy_001" in name else [0, 1])


def test_means_weigh_steps_by_their_triplets(build_run: BuildRun) -> None:
    steps = load_run(build_run(iterations=1, steps=2)).iterations[0].steps
    first = steps[0].model_copy(update={"num_triplets": 30, "loss": 1.0})
    last = steps[1].model_copy(update={"num_triplets": 10, "loss": 5.0, "log_prob_proto": None})
    assert weighted_mean([first, last], "loss") == pytest.approx(2.0)
    assert weighted_mean([first, last], "log_prob_proto") == first.log_prob_proto
    assert weighted_mean([last], "log_prob_proto") is None
    assert weighted_mean([], "loss") is None
