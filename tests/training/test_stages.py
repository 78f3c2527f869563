"""The training stage on ranks of which one sees an old state of the disk."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_tspin.config import Config
from megatron_tspin.run_folder import RunFolder
from tests.rank_pool import in_layout
from tests.stale_disk import stale_on_rank_1
from tests.training.rescored import save_policy
from tests.training.trajectory import make_config
from tests.training.triplet_files import write_triplets

ITERATION = 1


@pytest.fixture
def config(tmp_path: Path, ranks: Any, tiny_checkpoint: Any) -> Config:
    """An iteration in bf16 with a reference policy, over two replicas."""
    run = RunFolder(tmp_path / "run")
    write_triplets(run, ITERATION)
    ranks(1).run(save_policy, tiny_checkpoint("tied"), run.checkpoints(ITERATION - 1) / "step_00000007")
    settings = {
        "run_dir": str(run.root),
        "objective.method": "spin",
        "parallel.data_parallel_size": 2,
        "precision.bf16": True,
        "training.row_capacity": None,
        "training.train_iters": 2,
        "training.save_interval": 1,
        "training.global_batch_size": 4,
        "training.tensorboard": False,
    }
    return make_config(tiny_checkpoint("tied"), **settings)


def train(config: Config, files: list[Path], folders: list[Path], break_after: int | None = None) -> list[int]:
    """On ranks: the stage; returns the steps that this rank made. With `break_after`, it fails after so many.

    Rank 1 does not see the files, nor what the folders hold; what it is told of in them it can read.
    """
    from megatron_tspin.training import stages
    from megatron_tspin.training.loop import Trainer

    made: list[int] = []
    step = Trainer.train_step

    def train_step(trainer: Trainer, triplets: Any) -> Any:
        if len(made) == break_after:
            raise InterruptedError
        metrics = step(trainer, triplets)
        made.append(metrics.step)
        return metrics

    with (
        patch.object(stages, "distributed", lambda layout, *_: in_layout(layout)),
        patch.object(Trainer, "train_step", train_step),
        stale_on_rank_1(*files),
        stale_on_rank_1(*folders, below=False),
    ):
        try:
            stages.train_run(config, ITERATION, None, None)
        except InterruptedError:
            return made
    return made


def test_all_ranks_continue_from_what_rank_0_sees(config: Config, ranks: Any) -> None:
    run = RunFolder(Path(config.run_dir))
    files = [run.reference(ITERATION), run.reference(ITERATION).with_suffix(".json"), run.precision(ITERATION)]
    folders = [run.checkpoints(ITERATION - 1), run.checkpoints(ITERATION)]
    pool = ranks(2)
    assert pool.run(train, config, files, folders, 1) == [[1]] * 2
    written = {path: path.stat().st_mtime_ns for path in files}
    assert pool.run(train, config, files, folders) == [[2]] * 2
    assert {path: path.stat().st_mtime_ns for path in files} == written
