"""A run that is interrupted and continued in another way trains the same policy as one that never stopped."""

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import Runs
from tests.end_to_end.small_run import CHECKPOINT, NUM_STEPS, sha256_of, succeed, tree_of, write_config
from tests.end_to_end.test_kill import Kill, Processes, kill_once, losses
from tests.rounding import all_within, same_updates

# Slow: what it shows is shown piece by piece, by the trajectories of layouts and by the driver's test of the same name.
pytestmark = [pytest.mark.processes, pytest.mark.slow]

IN_ROLLOUT = Kill("rollout_000", "iteration_000/synthetic/shard_00002.jsonl", ("proto/summary.json",))
IN_TRAINING = Kill(
    "train_000",
    "iteration_000/checkpoint/step_00000004",
    ("iteration_000/checkpoint/step_00000003/manifest.json",),
    lines=4,
)
OTHER_BATCHES: dict[str, Any] = {"generation__shard_size": 5, "generation__batch_size": 3}
OTHER_LAYOUT: dict[str, Any] = {
    **OTHER_BATCHES,
    "parallel__tensor_model_parallel_size": 2,
    "parallel__sequence_parallel": True,
    "training__micro_batch_size": 2,
    "training__layout": "padded",
    "training__recompute_granularity": "full",
    "training__keep_checkpoints": 1,
    "data__tokenizer_threads": 1,
}


def test_a_run_is_continued_in_another_way(runs: Runs, base_run: Path, tmp_path: Path) -> None:
    run_dir, config, log = tmp_path / "run", tmp_path / "config.yaml", tmp_path / "log"
    processes = Processes()
    try:
        for changes, kill in (({}, IN_ROLLOUT), (OTHER_BATCHES, IN_TRAINING)):
            write_config(config, tree_of(runs.folder, run_dir, **changes))
            kill_once(kill, config, run_dir, processes, tmp_path / "paused", log)
        kept = {path.name for path in (run_dir / "iteration_000/checkpoint").iterdir()}
        assert kept == {"step_00000002", "step_00000003", "step_00000004.partial"}, "the latest two"
    finally:
        processes.kill_all()
    write_config(config, tree_of(runs.folder, run_dir, **OTHER_LAYOUT))
    done = succeed("run", "--config", config)
    assert "parallel.tensor_model_parallel_size: 1 in the run, 2 now" in done.stderr
    assert "continuing after step 3 of 8" in done.stderr
    check_same_answers(run_dir, base_run)
    check_same_training(run_dir, base_run)
    again = succeed(
        "run", "--config", config, "--set", "parallel.tensor_model_parallel_size=1", "--no-sequence-parallel"
    )
    assert again.stderr.count("done before") == 7


def check_same_answers(run_dir: Path, base_run: Path) -> None:
    for patterns in (("*.bin", "*.idx"), ("train.jsonl", "held_out.jsonl")):
        assert sha256_of(run_dir, *patterns) == sha256_of(base_run, *patterns)
    shards = sorted(path.name for path in (run_dir / "iteration_000/synthetic").glob("shard_*.jsonl"))
    assert shards == [f"shard_{number:05d}.jsonl" for number in range(4)], "of 8, as it was begun"
    assert len(list((run_dir / "evaluation/policy_001/greedy").glob("shard_*.jsonl"))) == 4, "of 5"


def check_same_training(run_dir: Path, base_run: Path) -> None:
    found, expected = losses(run_dir, 0), losses(base_run, 0)
    assert [line["step"] for line in found] == list(range(1, NUM_STEPS + 1))
    all_within("loss", *([line["loss"] for line in lines] for lines in (found, expected)))
    same_updates(*(weights(folder) for folder in (run_dir / "export/hf", base_run / "export/hf", CHECKPOINT)))


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")
