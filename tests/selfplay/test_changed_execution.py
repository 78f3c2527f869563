"""A run that was begun may be executed otherwise from then on, and go further; its results stay bound."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import Config
from megatron_tspin.config_source import load_config, settings
from megatron_tspin.errors import InputError, StageError
from megatron_tspin.selfplay import driver
from megatron_tspin.selfplay.run_config import result_digest
from tests.selfplay.fake_world import FakeRun

pytestmark = pytest.mark.processes

ConfigOf = Callable[..., Config]

OTHER: dict[str, Any] = {
    "data.tokenizer_threads": 3,
    "model.verify_conversion": False,
    "training.micro_batch_size": 2,
    "training.save_interval": 5,
    "training.keep_checkpoints": 1,
    "training.recompute_granularity": "full",
    "training.layout": "padded",
    "training.share_prompts": False,
    "training.row_capacity": 400,
    "training.packed_attention": "dense",
    "training.diagnostics": True,
    "training.tensorboard": False,
    "precision.rescored_prompts": 3,
    "precision.noise_warning": 0.5,
    "parallel.tensor_model_parallel_size": 2,
    "parallel.pipeline_model_parallel_size": 2,
    "parallel.virtual_pipeline_model_parallel_size": 2,
    "parallel.data_parallel_size": 2,
    "parallel.context_parallel_size": 2,
    "parallel.sequence_parallel": True,
    "parallel.use_distributed_optimizer": True,
    "parallel.overlap_grad_reduce": True,
    "parallel.overlap_param_gather": True,
    "parallel.cpu_threads": 2,
    "generation.batch_size": 5,
    "generation.cache_gib": 0.01,
    "generation.shard_size": 7,
    "generation.tensor_model_parallel_size": 1,
    "generation.pipeline_model_parallel_size": 1,
    "generation.data_parallel_size": 1,
    "generation.server_wait_seconds": 5.0,
    "generation.server_timeout_seconds": 5.0,
    "generation.server_retries": 1,
    "generation.vllm_python": "/usr/bin/python3",
    "generation.drift_bound": 0.2,
    "self_play.keep_policies": 1,
    "evaluation.scorer_seconds": 5.0,
    "launch.hang_seconds": 50.0,
    "launch.long_hang_seconds": 500.0,
    "launch.stop_seconds": 50.0,
    "launch.launcher": "slurm",
    "launch.max_restarts": 3,
    "launch.nodes": 2,
    "launch.gpus_per_node": 4,
    "launch.ranks_per_node": 2,
    "launch.cpus_per_rank": 3,
    "launch.time": "1:00:00",
    "launch.stop_before_end": 60,
    "launch.partition": "short",
    "launch.account": "us",
    "launch.qos": "low",
    "launch.modules": ["cuda"],
    "launch.exports": {"NCCL_DEBUG": "WARN"},
    "launch.setup": [". venv/bin/activate"],
    "launch.sbatch": ["--exclusive"],
    "launch.srun": ["--cpu-bind=cores"],
    "launch.container": "apptainer",
    "launch.image": "image.sif",
    "launch.mounts": ["/data:/data"],
}
"""Another value for everything that may change, but for run_dir."""
NEEDED: dict[str, dict[str, Any]] = {
    "parallel.virtual_pipeline_model_parallel_size": {"parallel.pipeline_model_parallel_size": 2},
    "parallel.sequence_parallel": {"parallel.tensor_model_parallel_size": 2},
    "parallel.overlap_param_gather": {
        "parallel.use_distributed_optimizer": True,
        "parallel.overlap_grad_reduce": True,
    },
}


def test_every_setting_that_may_change_is_tried_here() -> None:
    free = {item.name for item in settings() if item.affects in ("execution", "report")}
    # The last two need experts and another engine.
    assert free == {*OTHER, "run_dir", "parallel.expert_model_parallel_size", "generation.server_urls"}


@pytest.mark.parametrize("name", [*(name for name in OTHER if not name.startswith("launch.")), "launch"])
def test_a_changed_execution_continues_the_run(name: str, fake: FakeRun, config_of: ConfigOf) -> None:
    fake.behave(train_000="fail1")
    with pytest.raises(StageError):
        fake.go()
    fake.behave()
    if name == "launch":  # where and how: all at once
        changes = {each: value for each, value in OTHER.items() if each.startswith("launch.")}
    else:
        changes = {**NEEDED.get(name, {}), name: OTHER[name]}
    other = config_of(**{key.replace(".", "__"): value for key, value in changes.items()})
    assert result_digest(other) == result_digest(fake.config)
    fake.take_started()
    assert fake.go(other) == 0
    started = [stage for stage in fake.take_started() if stage != "doctor"]  # with which a Slurm job begins
    assert started == ["train_000", "rollout_001", "train_001", "rollout_002", "export", "report"]
    assert load_config(fake.run_dir / "run.yaml", {}) == other
    assert fake.go() == 0  # and back again: everything is done
    assert fake.take_started() == []


def test_the_next_marker_and_the_log_tell_of_the_change(
    fake: FakeRun, config_of: ConfigOf, caplog: pytest.LogCaptureFixture
) -> None:
    fake.behave(train_000="fail1")
    with pytest.raises(StageError):
        fake.go()
    fake.behave()
    with caplog.at_level("INFO", logger="megatron_tspin"):
        fake.go(config_of(training__micro_batch_size=2))
    assert "training.micro_batch_size: 4 in the run, 2 now" in caplog.text
    found = {
        stage: json.loads((fake.run_dir / "stages" / f"{stage}.json").read_text())["execution"]
        for stage in ("rollout_000", "train_000")
    }
    assert [found[stage]["training.micro_batch_size"] for stage in found] == [4, 2]
    free = {item.name for item in settings() if item.affects == "execution"}
    assert all(set(execution) == free for execution in found.values())


@pytest.mark.parametrize(
    "change",
    [
        {"training__micro_batch_size": 2},
        {"training__row_capacity": 256},
        {"training__share_prompts": False},
        {"training__layout": "padded"},
        {"parallel__context_parallel_size": 5},
    ],
    ids=str,
)
def test_what_truncation_leaves_is_a_result(change: dict[str, Any], fake: FakeRun, config_of: ConfigOf) -> None:
    cutting: dict[str, Any] = {"training__over_capacity": "truncate", "data__seq_length": 1024}
    fake.go(config_of(**cutting))
    with pytest.raises(InputError, match="training.over_capacity cuts: triplets to 4096 tokens, prompts shared in"):
        fake.go(config_of(**cutting, **change))
    assert fake.go(config_of(**cutting, training__recompute_granularity="full")) == 0


def rescoring(config_of: ConfigOf, prompts: int) -> Config:
    return config_of(precision__bf16=True, precision__rescored_prompts=prompts)


def test_a_measurement_may_be_switched_off_later(fake: FakeRun, config_of: ConfigOf) -> None:
    fake.go(rescoring(config_of, 4))
    fake.take_started()
    assert fake.go(rescoring(config_of, 0)) == 0
    assert set(fake.take_started()) <= {"report"}
    (fake.run_dir / "iteration_000" / "precision.json").write_text("changed")
    with pytest.raises(InputError, match=r"precision\.json"):
        fake.go(rescoring(config_of, 0))


def test_a_measurement_may_be_switched_on_later(fake: FakeRun, config_of: ConfigOf) -> None:
    fake.behave(train_001="fail1")
    with pytest.raises(StageError):
        fake.go(rescoring(config_of, 0))
    fake.behave()
    fake.take_started()
    assert fake.go(rescoring(config_of, 4)) == 0
    assert "train_000" not in fake.take_started()
    assert (fake.run_dir / "iteration_001" / "precision.json").is_file()
    assert fake.go(rescoring(config_of, 4)) == 0
    assert fake.take_started() == []


def test_a_finished_run_may_be_given_more_iterations(
    fake: FakeRun, config_of: ConfigOf, capsys: pytest.CaptureFixture[str]
) -> None:
    """What used to be its last rollout has the answers to train on still to give, and another policy is exported."""
    fake.go()
    fake.take_started()
    longer = config_of(self_play__iterations=4)
    open_stages = ["rollout_002", "train_002", "rollout_003", "train_003", "rollout_004", "export"]
    before = {path: path.read_bytes() for path in fake.run_dir.rglob("*") if path.is_file()}
    driver.run(longer, dry_run=True)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines if line[1:3] == ["to", "do"]] == open_stages
    assert {path: path.read_bytes() for path in fake.run_dir.rglob("*") if path.is_file()} == before
    fake.behave(train_003="fail1")
    with pytest.raises(StageError):
        fake.go(longer)
    assert fake.take_started() == open_stages[:4]
    fake.behave()
    assert fake.go(longer) == 0
    assert fake.take_started() == [*open_stages[3:], "report"]
    assert json.loads((fake.run_dir / "stages" / "export.json").read_text())["inputs"].keys() >= {
        "iteration_003/checkpoint/step_00000004/manifest.json"
    }
    with pytest.raises(InputError, match="self_play.iterations: 4 in the run, 2 now"):
        fake.go()


def test_more_iterations_survive_an_interruption_before_they_are_written_down(
    fake: FakeRun, config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.go()
    fake.take_started()
    with monkeypatch.context() as patch:
        patch.setattr(driver, "write_config", lambda config: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fake.go(config_of(self_play__iterations=3))
    assert fake.go(config_of(self_play__iterations=3)) == 0
    assert fake.take_started()[0] == "rollout_002" and (fake.run_dir / "iteration_002" / "metrics.jsonl").is_file()


def test_relocating_settings_change_nothing_else(fake: FakeRun, config_of: ConfigOf, world: Path) -> None:
    assert result_digest(config_of(run_dir=str(world / "elsewhere"))) == result_digest(fake.config)
