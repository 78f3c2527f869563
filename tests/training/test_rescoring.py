"""Iterations in bf16 start by measuring their noise: against scores at both precisions, and never twice."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import Config
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.errors import DivergenceError
from megatron_tspin.objective.roles import ROLES, computed_roles
from megatron_tspin.records import Response
from megatron_tspin.run_folder import RunFolder
from megatron_tspin.training.triplet_source import TripletSource
from tests.training.rescored import (
    ANSWER,
    Build,
    judge,
    mean_absolute,
    record_of,
    run,
    save_policy,
    scores_at,
    train,
    write_shards,
)
from tests.training.trajectory import make_config
from tests.training.triplet_files import LENGTHS, all_of, write_triplets


@pytest.fixture
def build(tmp_path: Path, tiny_checkpoint: Any, policy: Path) -> Build:
    """Writes the documents and shards of an iteration; returns the config of its run."""

    def config(iteration: int = 1, **settings: Any) -> Config:
        run = {"run_dir": str(tmp_path / "run"), "training.global_batch_size": 3, "training.row_capacity": None}
        small = {"training.train_iters": 1, "training.tensorboard": False, "precision.bf16": True}
        made = make_config(tiny_checkpoint("tied"), **{**run, **small, **settings})
        if not Path(made.run_dir).exists():
            write_triplets(RunFolder(Path(made.run_dir)), iteration)
            write_shards(RunFolder(Path(made.run_dir)).synthetic(iteration), policy)
        return made

    return config


@pytest.mark.parametrize("method", ["tspin", "tspin_ref", "spin", "sft"])
def test_noise_is_what_scores_at_two_precisions_say(method: str, build: Build, ranks: Any, policy: Path) -> None:
    config = build(**{"objective.method": method})
    run(ranks, config, policy)
    found = record_of(config)
    judged = judge(ranks, Path(config.model.hf_checkpoint), computed_roles(config.objective.method, 0.3))
    errors, tokens = judged.errors, judged.tokens
    assert (found.iteration, found.num_prompts, found.num_responses) == (1, 8, 8 * judged.roles)
    assert found.mean_tokens == pytest.approx(statistics.fmean(tokens))
    assert found.precision == "bf16 with fp32 masters, linear layers by torch" and found.seconds > 0
    assert found.without_reference == (method in ("spin", "tspin_ref"))
    noise = found.log_prob
    assert noise.mean == pytest.approx(statistics.fmean(errors))
    assert noise.standard_deviation == pytest.approx(statistics.pstdev(errors))
    assert 0 < noise.mean_absolute == pytest.approx(mean_absolute(errors))
    worst = max(range(len(errors)), key=lambda i: abs(errors[i]))
    assert noise.largest_absolute == pytest.approx(abs(errors[worst]))
    assert noise.largest_id == f"ex-{worst // judged.roles}"
    assert noise.per_token_rms == pytest.approx((sum(error * error for error in errors) / sum(tokens)) ** 0.5)


@pytest.mark.parametrize(
    ("method", "iteration", "scale", "terms"),
    [
        ("tspin", 1, 0.1, {"current_margin": (0, 1), "historical_margin": (1, 2)}),
        ("tspin", 0, 0.1, {"current_margin": (0, 1)}),
        ("tspin_ref", 1, 0.1, {"current_margin": (0, 1), "historical_margin": (1, 2)}),
        ("spin", 1, 0.05, {"current_margin": (0, 1)}),
        ("sft", 1, 0.0, {}),
    ],
)
def test_margins_are_scaled_differences(
    method: str, iteration: int, scale: float, terms: dict[str, Any], build: Build, ranks: Any, policy: Path
) -> None:
    config = build(iteration, **{"objective.method": method, "objective.spin_lambda": 0.05})
    run(ranks, config, policy, iteration)
    found = record_of(config, iteration)
    roles = computed_roles(config.objective.method, 0.0 if iteration == 0 else 0.3)
    judged = judge(ranks, Path(config.model.hf_checkpoint), roles)
    for name in ("current_margin", "historical_margin"):
        margin = getattr(found, name)
        assert (margin is not None) == (name in terms)
        if margin is not None:
            median = scale * statistics.median(map(abs, judged.margins(judged.exact, *terms[name])))
            noise = scale * mean_absolute(judged.margins(judged.errors, *terms[name]))
            assert margin.median_absolute == pytest.approx(median)
            assert margin.noise.mean_absolute == pytest.approx(noise)
            assert margin.noise_share == pytest.approx(noise / median)
            assert 0 < margin.noise_share < 0.05
    if method == "sft":
        assert (found.drift, found.no_drift) == (None, "the method has no sampled answers")
        return
    drifts = [score - ANSWER * LENGTHS[i][2] for i, score in enumerate(judged.coarse[1 :: judged.roles])]
    assert found.drift is not None and found.no_drift is None
    assert found.drift.mean == pytest.approx(statistics.fmean(drifts))
    assert found.drift_share == pytest.approx(scale * mean_absolute(drifts) / found.current_margin.median_absolute)  # type: ignore[union-attr]


def once(policy: Path) -> dict[str, int]:
    return {path.name: 1 for path in policy.glob("*.distcp")}


def test_the_checkpoint_is_read_once_and_fp32_weights_lie_in_the_gradient_buffers(
    build: Build, ranks: Any, policy: Path
) -> None:
    (seen,) = run(ranks, build(), policy)
    assert seen.read == once(policy)
    assert len(seen.in_gradient_buffers) > 20 and all(seen.in_gradient_buffers)


@pytest.mark.parametrize("settings", [{"precision.bf16": False}, {"precision.rescored_prompts": 0}], ids=str)
def test_nothing_is_measured(settings: dict[str, Any], build: Build, ranks: Any, policy: Path) -> None:
    config = build(**settings)
    (seen,) = run(ranks, config, policy)
    assert seen.read == once(policy) and not seen.in_gradient_buffers
    assert not RunFolder(Path(config.run_dir)).precision(1).exists()


def test_a_record_that_is_there_is_kept(build: Build, ranks: Any, policy: Path) -> None:
    config = build()
    path = RunFolder(Path(config.run_dir)).precision(1)
    path.write_text("kept")
    assert not run(ranks, config, policy)[0].in_gradient_buffers
    assert path.read_text() == "kept"


def test_the_sample_is_as_large_as_was_asked_for(build: Build, ranks: Any, policy: Path) -> None:
    config = build(**{"precision.rescored_prompts": 3})
    run(ranks, config, policy)
    found = record_of(config)
    assert (found.num_prompts, found.num_responses, found.no_drift) == (3, 9, None)
    assert found.drift is not None and found.drift.count == 3


def change_settings(folder: Path) -> None:
    values = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(values | {"checkpoint_sha256": "other"}))


def change_answer(folder: Path) -> None:
    lines = (folder / "shard_00001.jsonl").read_text().splitlines()
    answer = Response.model_validate_json(lines[0])
    lines[0] = answer.model_copy(update={"response_ids": [99, *answer.response_ids[1:]]}).line().strip()
    (folder / "shard_00001.jsonl").write_text("\n".join(lines) + "\n")


def tear(folder: Path) -> None:
    path = folder / "shard_00002.jsonl"
    path.write_text(path.read_text()[:-9])


def lose_answer(folder: Path) -> None:
    path = folder / "shard_00000.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (change_settings, "sampled from another checkpoint"),
        (change_answer, "the stored answer to prompt ex-3 is not the one that is trained on"),
        (tear, "shard_00002.jsonl:2: not valid JSON"),
        (lose_answer, "does not hold the answers of all sampled prompts"),
    ],
)
def test_drift_is_left_out_with_its_reason(
    damage: Callable[[Path], None], reason: str, build: Build, ranks: Any, policy: Path
) -> None:
    """What cannot be compared stops no training: the answers trained on come from the documents."""
    config = build()
    damage(RunFolder(Path(config.run_dir)).synthetic(1))
    run(ranks, config, policy)
    found = record_of(config)
    assert found.drift is None and found.drift_share is None and reason in str(found.no_drift)
    assert found.current_margin is not None


def test_answers_cut_to_a_row_are_compared_as_far_as_they_go(build: Build, ranks: Any, policy: Path) -> None:
    cut = {"training.row_capacity": 40, "training.over_capacity": "truncate"}
    config = build(**cut, **{"objective.method": "spin"})
    run(ranks, config, policy)
    triplets = all_of(TripletSource(config, 1, ROLES[:2]))
    assert len(triplets[4].responses["synthetic"]) < LENGTHS[4][2]
    pairs = [pair for triplet in triplets for pair in triplet.pairs()]
    scores = ranks(1).run(scores_at, Path(config.model.hf_checkpoint), PrecisionSection(bf16=True), pairs)[0][1::2]
    lengths = [len(triplet.responses["synthetic"]) for triplet in triplets]
    found = record_of(config).drift
    assert found is not None
    drifts = [score - ANSWER * length for score, length in zip(scores, lengths, strict=True)]
    assert found.mean == pytest.approx(statistics.fmean(drifts))


def test_fp8_is_noisier_than_bf16(build: Build, ranks: Any, policy: Path) -> None:
    config = build()
    run(ranks, config, policy)
    in_bf16 = record_of(config)
    RunFolder(Path(config.run_dir)).precision(1).unlink()
    ranks(1).run(train, build(**{"precision.fp8": "hybrid"}), 1, policy, Path(config.run_dir) / "checkpoint_of_fp8")
    in_fp8 = record_of(config)
    assert in_fp8.precision.startswith("bf16 with fp32 masters, linear layers in FP8 (hybrid, tensorwise scaling)")
    assert in_fp8.current_margin is not None and in_bf16.current_margin is not None
    assert in_fp8.current_margin.median_absolute == pytest.approx(in_bf16.current_margin.median_absolute, rel=1e-6)
    assert in_fp8.log_prob.per_token_rms > 2 * in_bf16.log_prob.per_token_rms


@pytest.mark.parametrize("alike", [6, 8])
def test_pairs_of_equal_responses_have_no_margin(alike: int, build: Build, ranks: Any, policy: Path) -> None:
    config = build(iteration=0)
    write_shards(RunFolder(Path(config.run_dir)).synthetic(0), policy, alike)
    run(ranks, config, policy, 0)
    found = record_of(config, 0)
    assert found.log_prob.count == 16 and found.drift is not None and found.drift.count == 8
    if alike == 8:
        assert found.current_margin is None and found.drift_share is None
        return
    judged = judge(ranks, Path(config.model.hf_checkpoint), ROLES[:2])
    sizes = [abs(0.1 * margin) for margin in judged.margins(judged.exact, 0, 1)[alike:]]
    assert found.current_margin is not None and found.current_margin.noise.count == 2
    assert found.current_margin.median_absolute == pytest.approx(statistics.fmean(sizes), rel=1e-5)
    assert found.current_margin.noise.largest_id in ("ex-6", "ex-7")


OVERLAPPING = {
    "parallel.data_parallel_size": 2,
    "parallel.use_distributed_optimizer": True,
    "parallel.overlap_grad_reduce": True,
    "parallel.overlap_param_gather": True,
}


@pytest.mark.parametrize(
    "layout",
    [
        {"parallel.tensor_model_parallel_size": 2},
        {"parallel.pipeline_model_parallel_size": 2},
        {"parallel.pipeline_model_parallel_size": 2, "parallel.virtual_pipeline_model_parallel_size": 2},
        OVERLAPPING,
    ],
    ids=["tensor", "pipeline", "virtual", "overlapping"],
)
def test_another_layout_finds_the_same_noise(layout: dict[str, Any], build: Build, ranks: Any, policy: Path) -> None:
    one = build()
    run(ranks, one, policy)
    alone = record_of(one)
    RunFolder(Path(one.run_dir)).precision(1).unlink()
    two = build(**layout, run_dir=one.run_dir)
    ranks(2).run(train, two, 1, policy, Path(two.run_dir) / "checkpoint_of_two")
    found_by_two = record_of(two)
    for found, other in (
        (found_by_two.current_margin, alone.current_margin),
        (found_by_two.historical_margin, alone.historical_margin),
    ):
        assert found is not None and other is not None
        assert found.median_absolute == pytest.approx(other.median_absolute, rel=1e-5)
        assert found.noise.mean_absolute == pytest.approx(other.noise.mean_absolute, rel=0.8)
    assert found_by_two.drift is not None and alone.drift is not None
    assert found_by_two.drift.mean_absolute == pytest.approx(
        alone.drift.mean_absolute, abs=2 * alone.log_prob.mean_absolute
    )


def test_weights_that_are_broken_are_named_before_the_first_step(
    build: Build, ranks: Any, policy: Path, tmp_path: Path
) -> None:
    config = build()
    broken = tmp_path / "broken"
    ranks(1).run(save_policy, Path(config.model.hf_checkpoint), broken, float("nan"))
    with pytest.raises(DivergenceError, match="to 8 of 8 sampled prompts are not finite in fp32; the weights hold NaN"):
        run(ranks, config, broken)
    assert not RunFolder(Path(config.run_dir)).precision(1).exists()
