import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tspin.config import Config
from megatron_tspin.selfplay import launch
from megatron_tspin.selfplay.failure import Failure, clear_failure, failure_file, read_failure, record_failure
from megatron_tspin.selfplay.launchers import LocalLauncher
from megatron_tspin.selfplay.plan import plan


def test_one_rank_needs_no_torchrun(config_of: Callable[..., Config]) -> None:
    stage = next(stage for stage in plan(config_of()) if stage.name == "train_001")
    run_yaml = str(Path(config_of().run_dir) / "run.yaml")
    assert LocalLauncher().command(stage) == [
        sys.executable, "-m", "megatron_tspin", "train", "--config", run_yaml, "--iteration", "1",
    ]  # fmt: skip


def test_several_ranks_use_torchrun(config_of: Callable[..., Config]) -> None:
    config = config_of(parallel__tensor_model_parallel_size=2)
    stage = next(stage for stage in plan(config) if stage.name == "convert")
    command = LocalLauncher().command(stage)
    assert command[1:4] == ["-m", "torch.distributed.run", "--standalone"]  # which finds a port by itself
    assert command[4:11] == ["--local-addr", "127.0.0.1", "--nproc-per-node", "2", "-m", "megatron_tspin", "convert"]


def test_environment(config_of: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    env = launch.environment(config_of(parallel__cpu_threads=3), tmp_path / "x.log")
    assert env["OMP_NUM_THREADS"] == "3" and env["HF_HUB_OFFLINE"] == "1" and env["PYTHONUNBUFFERED"] == "1"
    assert env["PYTHONPATH"].endswith(":/mine")
    assert (Path(env["PYTHONPATH"].split(":")[0]) / "megatron_tspin" / "__main__.py").is_file()


def test_the_first_failure_counts(tmp_path: Path) -> None:
    log_file = tmp_path / "train_000.log"
    assert read_failure(log_file) is None
    assert record_failure(log_file, Failure(1, 2, "bad"))
    assert not record_failure(log_file, Failure(0, 2, "bad"))  # nothing new for a person
    assert record_failure(log_file, Failure(2, 5, "worse"))  # new, but not first
    assert read_failure(log_file) == Failure(1, 2, "bad")
    clear_failure(log_file)
    assert read_failure(log_file) is None
    assert list(tmp_path.iterdir()) == []


def test_commands_are_shown_short(
    config_of: Callable[..., Config], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    one, several = (
        next(stage for stage in plan(config_of(parallel__tensor_model_parallel_size=size)) if stage.name == "train_001")
        for size in (1, 2)
    )
    words = "train --config run/run.yaml --iteration 1"
    assert launch.shown(LocalLauncher().command(one)) == f"tspin {words}"
    assert launch.shown(LocalLauncher().command(several)) == (
        f"torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2 -m megatron_tspin {words}"
    )


def test_a_rank_that_lost_another_one_does_not_hide_its_reason(tmp_path: Path) -> None:
    log_file = tmp_path / "x.log"
    lost = Failure(0, 3, "lost another rank", consequence=True)
    assert record_failure(log_file, lost) and read_failure(log_file) == lost
    cause = Failure(1, 2, "a.jsonl:3: bad line")
    assert record_failure(log_file, cause) and read_failure(log_file) == cause
    assert not record_failure(log_file, replace(lost, rank=2))
    assert read_failure(log_file) == cause
    clear_failure(log_file)
    assert read_failure(log_file) is None and list(tmp_path.iterdir()) == []


def test_a_failure_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_file = tmp_path / "absent" / "x.log"
    assert record_failure(log_file, Failure(0, 2, "the reason"))
    assert "x.failure.json cannot be written (No such file or directory)" in capsys.readouterr().err
    log_file.parent.mkdir()
    failure_file(log_file).write_text('{"rank": 0, "exi')  # torn by a full disk
    assert read_failure(log_file) is None


def test_a_launcher_around_the_driver_is_not_taken_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    around = {
        "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "elsewhere", "PET_NNODES": "2", "TORCHELASTIC_RUN_ID": "x",
        "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1",
    }  # fmt: skip
    kept = {"SLURM_JOB_ID": "17", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3", "OMPI_MCA_btl": "tcp", "MINE": "kept"}
    for name, value in {**around, **kept}.items():
        monkeypatch.setenv(name, value)
    found = launch.environment_without_launchers()
    assert not set(around) & set(found)
    assert kept.items() <= found.items() and found["PYTHONSAFEPATH"] == "1"
