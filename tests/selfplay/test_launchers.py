"""The command lines that start a stage's ranks."""

from collections.abc import Callable

import pytest

from megatron_tspin.config import Config
from megatron_tspin.config_launch import LaunchSection
from megatron_tspin.errors import InputError
from megatron_tspin.selfplay.launchers import LocalLauncher, SlurmLauncher, launcher_of
from megatron_tspin.selfplay.plan import Stage

TRAIN = Stage("train_000", ("train", "--config", "run.yaml"), 12, (), ())


def srun(stage: Stage = TRAIN, **settings: object) -> list[str]:
    command = SlurmLauncher(LaunchSection.model_validate(settings)).command(stage)
    assert command[0] == "srun" and command[-3:] == ["train", "--config", "run.yaml"]
    return command[1 : command.index("-m")]


def test_a_step_takes_the_nodes_that_its_ranks_need() -> None:
    options = ["--job-name=train_000", "--nodes=2", "--ntasks=12", "--ntasks-per-node=8", "--kill-on-bad-exit=1"]
    assert set(options) <= set(srun())
    assert "--gpus-per-node=8" in srun()
    alone = srun(Stage("tokenize", TRAIN.arguments, 1, (), ()))
    assert {"--nodes=1", "--ntasks=1", "--ntasks-per-node=1"} <= set(alone)


def test_settings_of_a_step() -> None:
    found = srun(gpus_per_node=0, ranks_per_node=4, cpus_per_rank=6, srun=["--cpu-bind=cores"])
    assert {"--nodes=3", "--ntasks-per-node=4", "--cpus-per-task=6", "--cpu-bind=cores"} <= set(found)
    assert not [option for option in found if option.startswith("--gpus")]


def test_containers() -> None:
    pyxis = srun(container="pyxis", image="nvcr.io#nvidia/pytorch:26.01-py3", mounts=["/data:/data", "/run:/run"])
    assert pyxis[-3:] == [
        "--container-image=nvcr.io#nvidia/pytorch:26.01-py3", "--container-mounts=/data:/data,/run:/run", "python",
    ]  # fmt: skip
    apptainer = srun(container="apptainer", image="torch.sif", mounts=["/data:/data"])
    assert apptainer[-7:] == ["apptainer", "exec", "--nv", "--bind", "/data:/data", "torch.sif", "python"]
    with pytest.raises(ValueError, match="belong together"):
        LaunchSection(container="pyxis")


def test_the_launcher_is_the_configured_one(config_of: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(launcher_of(config_of()), LocalLauncher)
    config = config_of(launch__launcher="slurm")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(InputError, match="no Slurm job; use tspin submit or salloc"):
        launcher_of(config)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert isinstance(launcher_of(config), SlurmLauncher)
