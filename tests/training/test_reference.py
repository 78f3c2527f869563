"""Reference log-probs: computed part by part, continued where they were interrupted, bound to what they are of."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_tspin.config import Config, ParallelSection
from megatron_tspin.errors import ArtifactError
from megatron_tspin.objective.roles import ROLES
from megatron_tspin.records import ReferenceLogProbs, read_records
from megatron_tspin.run_folder import RunFolder
from megatron_tspin.training.triplet_source import TripletSource
from tests.generation.answers import load
from tests.rank_pool import in_layout
from tests.stale_disk import stale_on_rank_1
from tests.training.trajectory import make_config
from tests.training.triplet_files import LENGTHS, write_triplets

ITERATION = 1
PART = 3
NUM_PARTS = 3  # of 8 triplets
FACTS = {"checkpoint_sha256": "c1", "documents": {"annotated": "d1"}}


class Interrupted(Exception):
    """Stands in for a kill."""


@pytest.fixture
def config(tmp_path: Path, tiny_checkpoint: Any) -> Config:
    write_triplets(RunFolder(tmp_path / "run"), ITERATION)
    settings = {"run_dir": str(tmp_path / "run"), "training.row_capacity": None, "training.global_batch_size": 3}
    return make_config(tiny_checkpoint("tied"), **settings)


def compute(
    config: Config, path: Path, layout: ParallelSection, facts: dict[str, Any], parts: int | None = None
) -> tuple[list[dict[str, float]], int]:
    """On ranks: the log-probs and the number of parts that were scored; with `parts`, it is interrupted after so many.

    Rank 1 never sees what is on the disk.
    """
    from megatron_tspin.objective.scoring import score_pairs
    from megatron_tspin.training import reference

    scored = 0

    def score(*arguments: Any, **options: Any) -> list[float]:
        nonlocal scored
        if scored == parts:
            raise Interrupted
        scored += 1
        return score_pairs(*arguments, **options)

    source = TripletSource(config, ITERATION, ROLES)
    with (
        in_layout(layout) as topology,
        patch.object(reference, "_PART_TRIPLETS", PART),
        patch.object(reference, "score_pairs", score),
        stale_on_rank_1(path, path.with_suffix(".json"), path.with_suffix(".parts")),
    ):
        model = [load(Path(config.model.hf_checkpoint), layout, topology)]
        try:
            found = reference.reference_log_probs(path, facts, model, topology, source)
        except Interrupted:
            found = []
        return found, scored


LAYOUTS = [{}, {"data_parallel_size": 2}, {"pipeline_model_parallel_size": 2}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_interrupted_pass_continues_to_the_same_bytes(
    layout: dict[str, int], config: Config, ranks: Any, tmp_path: Path
) -> None:
    parallel = ParallelSection(**layout)
    pool = ranks(parallel.world_size)
    unbroken, broken = (tmp_path / name / "reference.jsonl" for name in ("unbroken", "broken"))
    expected = pool.run(compute, config, unbroken, parallel, FACTS)
    assert [scored for _, scored in expected] == [NUM_PARTS] * parallel.world_size
    for done in range(2):  # each time one part more
        assert pool.run(compute, config, broken, parallel, FACTS, 1)[0] == ([], 1)
        assert not broken.exists()
        assert len(list(broken.with_suffix(".parts").iterdir())) == done + 1
    found = pool.run(compute, config, broken, parallel, FACTS)
    assert found == [(log_probs, 1) for log_probs, _ in expected]
    assert all(log_probs == expected[0][0] for log_probs, _ in found)
    assert sorted(path.name for path in broken.parent.iterdir()) == ["reference.json", "reference.jsonl"]
    for path in unbroken.parent.iterdir():
        assert (broken.parent / path.name).read_bytes() == path.read_bytes()
    assert pool.run(compute, config, broken, parallel, FACTS) == [(log_probs, 0) for log_probs, _ in expected]


def test_the_file_is_that_of_the_triplets(config: Config, ranks: Any, tmp_path: Path) -> None:
    path = tmp_path / "reference.jsonl"
    ((found, _),) = ranks(1).run(compute, config, path, ParallelSection(), FACTS)
    records = list(read_records(path, ReferenceLogProbs))
    assert [record.id for record in records] == [f"ex-{i}" for i in range(len(LENGTHS))]
    assert [record.log_probs for record in records] == found
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ArtifactError, match="reference.jsonl: not of this run's examples; remove the file"):
        ranks(1).run(compute, config, path, ParallelSection(), FACTS)


def test_log_probs_of_another_policy_are_refused_and_unfinished_ones_begun_again(
    config: Config, ranks: Any, tmp_path: Path
) -> None:
    path, layout, others = tmp_path / "reference.jsonl", ParallelSection(), {**FACTS, "checkpoint_sha256": "c2"}
    assert ranks(1).run(compute, config, path, layout, FACTS, 2)[0] == ([], 2)
    assert ranks(1).run(compute, config, path, layout, others)[0][1] == NUM_PARTS
    with pytest.raises(ArtifactError, match="checkpoint_sha256 was c2, now c1; remove the file to compute it again"):
        ranks(1).run(compute, config, path, layout, FACTS)
