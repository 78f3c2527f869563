"""An iteration trains on what it began with, whatever happens to its files meanwhile."""

from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import Config
from megatron_tspin.errors import ArtifactError
from megatron_tspin.run_folder import TRAIN, RunFolder, document_stem, file_of, step_folders
from tests.training.rescored import run, save_policy, train
from tests.training.trajectory import make_config
from tests.training.triplet_files import write_triplets


@pytest.fixture
def config(tmp_path: Path, tiny_checkpoint: Any) -> Config:
    settings = {
        "training.row_capacity": None,
        "training.global_batch_size": 2,
        "training.save_interval": 1,
        "training.tensorboard": False,
    }
    found = make_config(tiny_checkpoint("tied"), run_dir=str(tmp_path / "run"), **settings)
    write_triplets(RunFolder(Path(found.run_dir)), 0)
    return found


def train_while_a_file_changes(config: Config, policy: Path, save: Path, changed: Path) -> None:
    """On a rank: a token of a document is rewritten in place once the first checkpoint is there."""
    from unittest.mock import patch

    from megatron_tspin.training.triplet_source import TripletSource

    draw = TripletSource.global_batch

    def changing(self: Any, step: int) -> Any:
        if step == 1:
            first = changed.read_bytes()[0]
            with changed.open("r+b") as stream:
                stream.write(bytes([first ^ 1]))
        return draw(self, step)

    with patch.object(TripletSource, "global_batch", changing):
        train(config, 0, policy, save)


@pytest.mark.parametrize("key", ["annotated", "prompt"])
def test_documents_that_are_rewritten_during_training_are_noticed(
    key: str, config: Config, ranks: Any, policy: Path
) -> None:
    folder, save = RunFolder(Path(config.run_dir)), Path(config.run_dir) / "checkpoint"
    changed = file_of(document_stem(folder.data, TRAIN, key), "bin")
    before = changed.read_bytes()
    with pytest.raises(ArtifactError, match=f"{changed}: was rewritten while it was in use"):
        ranks(1).run(train_while_a_file_changes, config, policy, save, changed)
    assert changed.read_bytes() != before and len(changed.read_bytes()) == len(before)
    assert [path.name for path in step_folders(save)] == ["step_00000001"]  # from before the file changed
    changed.write_bytes(before)
    run(ranks, config, policy, iteration=0)
    assert step_folders(save)[-1].name == "step_00000004"


def test_a_policy_to_start_from_that_is_not_there_is_named(config: Config, ranks: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"{tmp_path / 'absent'}"):
        run(ranks, config, tmp_path / "absent", iteration=0)


def test_an_iteration_that_would_begin_with_something_else_is_refused(
    config: Config, ranks: Any, policy: Path, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    run(ranks, config, policy, iteration=0)
    run(ranks, config, policy, iteration=0)  # what is there is its own
    other = tmp_path / "other"
    ranks(1).run(save_policy, tiny_checkpoint("tied"), other, 0.5)
    with pytest.raises(ArtifactError, match="step_00000004: was trained from another policy, or on other documents"):
        run(ranks, config, other, iteration=0)
