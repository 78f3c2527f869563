"""Training in FP8 by torch: every layout is as near to fp32 as one rank, and a restart changes nothing."""

from pathlib import Path
from typing import Any

import pytest

from tests.rank_pool import in_layout
from tests.training.fp8_errors import errors
from tests.training.trajectory import assert_resumes_to_the_bit, make_config, train

RECIPES = {"tensorwise": {}, "rowwise": {"precision.fp8_recipe": "rowwise"}, "e4m3": {"precision.fp8": "e4m3"}}
TP2 = {"parallel.tensor_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": TP2,
    "tp2_sp": {**TP2, "parallel.sequence_parallel": True},
    "pp2": {"parallel.pipeline_model_parallel_size": 2},
    "cp2": {"parallel.context_parallel_size": 2},
    "recompute": {"training.recompute_granularity": "full"},
    "padded": {"training.layout": "padded"},
}


def in_fp8(hf: Path, recipe: str, **settings: Any) -> Any:
    return make_config(hf, **{"precision.bf16": True, "precision.fp8": "hybrid", **RECIPES[recipe], **settings})


@pytest.fixture(scope="module")
def alone(ranks: Any, tiny_checkpoint: Any, tmp_path_factory: Any) -> Any:
    """Errors of one rank by recipe, computed once."""
    known: dict[str, tuple[float, float]] = {}

    def get(recipe: str) -> tuple[float, float]:
        if recipe not in known:
            config = in_fp8(tiny_checkpoint("untied"), recipe)
            known[recipe] = errors(config, ranks, tmp_path_factory.mktemp("alone") / "out")
        return known[recipe]

    return get


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_is_near_and_is_fp8(recipe: str, alone: Any, ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    bf16 = errors(make_config(tiny_checkpoint("untied"), **{"precision.bf16": True}), ranks, tmp_path / "out")
    for rounded, error in zip(bf16, alone(recipe), strict=True):
        # e4m3 has 4 bits fewer than bf16, so single roundings are 16 times as large.
        assert 2 * rounded < error < 32 * rounded


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_every_layout_is_as_near(
    recipe: str, layout: str, alone: Any, ranks: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    config = in_fp8(tiny_checkpoint("untied"), recipe, **LAYOUTS[layout])
    for error, one_rank in zip(errors(config, ranks, tmp_path / "out"), alone(recipe), strict=True):
        assert error < 1.3 * one_rank


@pytest.mark.parametrize("layout", ["tp1", "tp2_sp"])
def test_resuming_changes_no_bit(layout: str, ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    config = in_fp8(tiny_checkpoint("tied"), "tensorwise", **LAYOUTS.get(layout, {}))
    assert_resumes_to_the_bit(ranks(config.parallel.world_size), config, tmp_path)


def test_the_gradient_norm_counts_every_shard(ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    """RMSProp hides a wrong norm, clipping does not."""
    alone, split = (in_fp8(tiny_checkpoint("untied"), "tensorwise", **flags) for flags in ({}, TP2))
    expected = ranks(1).run(train, alone, tmp_path / "alone")[0]
    found = ranks(2).run(train, split, tmp_path / "split")[0]
    # Loss and norm of the first step; later ones part, as FP8 magnifies the rounding of the sum over TP.
    assert found[:2] == pytest.approx(expected[:2], rel=0.03)


def kinds_of_layers(config: Any) -> Any:
    """For each layer on this rank, counted through the whole network, whether its linears are FP8."""
    from megatron_tspin.models.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear
    from tests.training.trajectory import _trainer

    with in_layout(config.parallel) as topology:
        policy = _trainer(config, topology).ddp.module
        found = {}
        for layer in policy.decoder.layers:
            linears = layer.self_attention.linear_qkv, layer.mlp.linear_fc1
            rows = layer.self_attention.linear_proj, layer.mlp.linear_fc2
            kinds = {isinstance(linear, Fp8ColumnParallelLinear) for linear in linears}
            kinds |= {isinstance(linear, Fp8RowParallelLinear) for linear in rows}
            (found[layer.layer_number - 1],) = kinds
        return found


@pytest.mark.parametrize("pipeline_stages", [1, 2])
def test_first_layers_stay_in_bf16(pipeline_stages: int, ranks: Any, tiny_checkpoint: Any) -> None:
    flags = {"precision.num_layers_at_start_in_bf16": 1, "parallel.pipeline_model_parallel_size": pipeline_stages}
    found: dict[int, bool] = {}
    for each in ranks(pipeline_stages).run(kinds_of_layers, in_fp8(tiny_checkpoint("tied"), "tensorwise", **flags)):
        found |= each
    assert found == {layer: layer > 0 for layer in range(len(found))}
    assert len(found) > 1
