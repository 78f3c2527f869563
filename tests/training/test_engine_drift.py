"""Answers that another engine sampled are scored again before they are trained on, in fp32 too, and held to a bound."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import Config
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.errors import ArtifactError, ParityError
from megatron_tspin.records import Response
from megatron_tspin.run_folder import RunFolder, shard_paths
from tests.training.rescored import Build, record_of, run, scores_at, write_shards
from tests.training.trajectory import make_config
from tests.training.triplet_files import LENGTHS, document, expected, write_triplets

Change = Callable[[int, float], float]


@pytest.fixture
def build(tmp_path: Path, tiny_checkpoint: Any, policy: Path) -> Build:
    """Writes the documents and shards of an iteration whose answers vLLM sampled; returns the config of its run."""

    def config(**settings: Any) -> Config:
        small = {"training.train_iters": 1, "training.tensorboard": False, "training.row_capacity": None}
        made = make_config(
            tiny_checkpoint("tied"),
            run_dir=str(tmp_path / "run"),
            **{**small, "training.global_batch_size": 3, "generation.engine": "vllm", **settings},
        )
        if not Path(made.run_dir).exists():
            write_triplets(RunFolder(Path(made.run_dir)), 1)
            write_shards(RunFolder(Path(made.run_dir)).synthetic(1), policy)
        return made

    return config


@pytest.fixture
def say(ranks: Any, tiny_checkpoint: Any) -> Callable[[Config, Change], list[float]]:
    """Lets the shards hold the policy's own log-probs, changed a token at a time; returns what was added to each y'."""

    def write(config: Config, change: Change) -> list[float]:
        pairs = [(document(i, 0, LENGTHS[i][0]), expected(i, "synthetic")) for i in range(len(LENGTHS))]
        (scores,) = ranks(1).run(scores_at, tiny_checkpoint("tied"), PrecisionSection(), pairs)
        off = []
        for path in shard_paths(RunFolder(Path(config.run_dir)).synthetic(1)):
            lines = []
            for line in path.read_text().splitlines():
                answer = Response.model_validate_json(line)
                count, score = len(answer.response_ids), scores[int(answer.id.removeprefix("ex-"))]
                values = [change(place, score / count) for place in range(count)]
                off.append(score - sum(values))
                lines.append(answer.model_copy(update={"token_log_probs": values}).line())
            path.write_text("".join(lines))
        return off

    return write


def as_it_is(place: int, value: float) -> float:
    return value


@pytest.mark.parametrize("bf16", [False, True])
def test_what_the_engine_said_is_measured_in_every_format(
    bf16: bool, build: Build, say: Any, ranks: Any, policy: Path
) -> None:
    config = build(**{"precision.bf16": bf16})
    off = say(config, lambda place, value: value + (0.01 if place == 0 else 0.0))
    run(ranks, config, policy)
    found = record_of(config)
    tokens = sum(lengths[2] for lengths in LENGTHS)
    assert found.engine_drift is not None and found.drift is not None
    assert found.engine_drift.mean == pytest.approx(-0.01, abs=1e-4)
    rms = (sum(value * value for value in off) / tokens) ** 0.5
    assert found.engine_drift.per_token_rms == pytest.approx(rms, rel=1e-2)
    if not bf16:
        assert found.drift == found.engine_drift and found.log_prob.largest_absolute == 0.0
        assert found.precision.startswith("fp32")
    assert (Path(config.run_dir) / "checkpoint").is_dir()


@pytest.mark.parametrize(
    "change",
    [
        lambda place, value: value / 0.6,  # at temperature 0.6
        lambda place, value: min(0.0, value + 0.35),  # over what top-p left
        lambda place, value: -2.5,  # of some other policy
    ],
    ids=["temperature", "top-p", "weights"],
)
def test_an_iteration_is_refused_above_the_bound_and_stays_so(
    change: Change, build: Build, say: Any, ranks: Any, policy: Path
) -> None:
    config = build()
    say(config, change)
    with pytest.raises(ParityError, match=r"iteration 1.* off by [\d.]+ nats a token \(bound 0.1; .* docs/vllm.md"):
        run(ranks, config, policy)
    path = RunFolder(Path(config.run_dir)).precision(1)
    before = path.read_text()
    with pytest.raises(ParityError, match="off by"):  # what was measured is there, and still binds
        run(ranks, config, policy)
    assert path.read_text() == before and not (Path(config.run_dir) / "checkpoint").exists()
    run(ranks, build(**{"generation.drift_bound": 100.0}), policy)
    assert path.read_text() == before and (Path(config.run_dir) / "checkpoint").is_dir()


def change_settings(folder: Path) -> None:
    values = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(values | {"checkpoint_sha256": "other"}))


def lose_answer(folder: Path) -> None:
    path = folder / "shard_00000.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(change_settings, "sampled from another checkpoint"), (lose_answer, "does not hold the answers")],
)
def test_what_cannot_be_compared_is_refused(
    damage: Callable[[Path], None], reason: str, build: Build, say: Any, ranks: Any, policy: Path
) -> None:
    config = build()
    say(config, as_it_is)
    damage(RunFolder(Path(config.run_dir)).synthetic(1))
    with pytest.raises(ParityError, match=f"could not be compared .*{reason}"):
        run(ranks, config, policy)


def test_a_torn_record_is_no_measurement(build: Build, say: Any, ranks: Any, policy: Path) -> None:
    config = build()
    say(config, as_it_is)
    RunFolder(Path(config.run_dir)).precision(1).write_text("{}")
    with pytest.raises(ArtifactError, match="precision.json: not what iterations write there"):
        run(ranks, config, policy)


def test_sft_samples_nothing_that_could_be_refused(build: Build, ranks: Any, policy: Path) -> None:
    config = build(**{"objective.method": "sft"})
    run(ranks, config, policy)
    assert not RunFolder(Path(config.run_dir)).precision(1).exists()


def test_all_ranks_are_refused_together(build: Build, say: Any, ranks: Any, policy: Path) -> None:
    config = build(**{"parallel.tensor_model_parallel_size": 2})
    say(config, lambda place, value: value - 1.0)
    with pytest.raises(ParityError, match="off by"):
        run(ranks, config, policy)
    off = statistics.fmean(-float(lengths[2]) for lengths in LENGTHS)
    found = record_of(config).engine_drift
    assert found is not None and found.mean == pytest.approx(-off, rel=1e-3)
