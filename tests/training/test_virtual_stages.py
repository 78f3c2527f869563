"""Virtual pipeline stages, from the checkpoint of one layout to that of another: the trajectory of everything else."""

from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import Config, ParallelSection, TrainingSection
from megatron_tspin.config_precision import PrecisionSection
from tests.rank_pool import in_layout
from tests.rounding import all_within, same_updates
from tests.training.trajectory import NUM_STEPS, _steps, make_config, train_plainly, weights

pytestmark = [pytest.mark.exact, pytest.mark.trajectory]

INTERLEAVED = {"parallel.pipeline_model_parallel_size": 2, "parallel.virtual_pipeline_model_parallel_size": 2}


def to_checkpoint(hf: Path, folder: Path) -> None:
    """On one rank: the HF weights as a distributed checkpoint."""
    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.checkpoint.store import save_checkpoint
    from megatron_tspin.models.build import build_policy
    from megatron_tspin.models.hf_config import read_architecture

    with in_layout(ParallelSection()) as topology:
        model = build_policy(read_architecture(hf), ParallelSection(), TrainingSection(), PrecisionSection(), topology)
        load_hf(model, topology)
        save_checkpoint(folder, model, topology)


def to_hf(folder: Path, hf: Path, target: Path) -> None:
    """On one rank: the checkpoint as HF weights."""
    from megatron_tspin.checkpoint.hf_weights import export_hf
    from megatron_tspin.checkpoint.policies import load_policy
    from megatron_tspin.models.hf_config import read_architecture

    with in_layout(ParallelSection()) as topology:
        model = load_policy(
            read_architecture(hf), ParallelSection(), TrainingSection(), PrecisionSection(), topology, folder
        )
        export_hf(model, topology, hf, target)


def train_interleaved(config: Config, start: Path, end: Path, stop_after: int | None = None) -> Any:
    """On ranks: trains from a checkpoint to a checkpoint; with `stop_after` through one with the optimizer."""
    from megatron_tspin.checkpoint.policies import load_chunks
    from megatron_tspin.checkpoint.store import load_checkpoint, save_checkpoint
    from megatron_tspin.models.hf_config import read_architecture
    from megatron_tspin.objective.scoring import score_pairs
    from megatron_tspin.training.loop import build_trainer

    architecture = read_architecture(Path(config.model.hf_checkpoint))
    with in_layout(config.parallel) as topology:

        def trainer_from(folder: Path) -> Any:
            chunks = load_chunks(architecture, config.parallel, config.training, config.precision, topology, folder)
            assert len(chunks) == 2
            return build_trainer(config, 1, topology, chunks, NUM_STEPS)

        trainer = trainer_from(start)
        scores = score_pairs(trainer.whole_policy(), topology, [([3, 4, 5], [6, 7]), ([8], [9, 10, 11])])
        losses = _steps(trainer, config, stop_after or NUM_STEPS)
        if stop_after is not None:
            between = end.with_name(end.name + "_between")
            save_checkpoint(between, trainer.chunks, topology, trainer.optimizer, {"step": trainer.done})
            trainer = trainer_from(start)
            trainer.done = load_checkpoint(between, trainer.chunks, topology, trainer.optimizer)["step"]
            losses += _steps(trainer, config, NUM_STEPS)
        save_checkpoint(end, trainer.whole_policy(), topology)
        return losses, scores


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "distributed_optimizer"])
def test_virtual_stages(kind: str, sharded: bool, ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    options = {**INTERLEAVED, "parallel.use_distributed_optimizer": sharded, "training.row_capacity": 64}
    config = make_config(tiny_checkpoint(kind), **options)
    ranks(1).run(to_checkpoint, tiny_checkpoint(kind), tmp_path / "start")
    (losses, scores), other = ranks(2).run(train_interleaved, config, tmp_path / "start", tmp_path / "end")
    assert (losses, scores) == other and all(score < 0 for score in scores)
    resumed = ranks(2).run(train_interleaved, config, tmp_path / "start", tmp_path / "resumed", 3)[0][0]
    assert resumed == losses
    ranks(1).run(to_hf, tmp_path / "end", tiny_checkpoint(kind), tmp_path / "out")
    expected_losses, expected = train_plainly(config)
    all_within("loss", losses[::2], expected_losses[::2])
    all_within("norm", losses[1::2], expected_losses[1::2])
    same_updates(weights(tmp_path / "out"), expected, weights(tiny_checkpoint(kind)))
