"""Transformer Engine under the whole policy: near to fp32, trains, continues, and steps as torch's RMSprop does."""

from pathlib import Path
from typing import Any

import pytest

from tests.rank_pool import in_layout
from tests.training.fp8_errors import errors
from tests.training.trajectory import _trainer, for_method, make_config, train, triplets_of, weights

ENGINE = {"precision.bf16": True, "precision.transformer_impl": "transformer_engine"}
RECIPES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "tensorwise": {"precision.fp8": "hybrid"},
    "tensorwise_e4m3": {"precision.fp8": "e4m3"},
    "delayed": {"precision.fp8": "hybrid", "precision.fp8_recipe": "delayed"},
    "blockwise": {"precision.fp8": "e4m3", "precision.fp8_recipe": "blockwise"},
    "first_layer_in_bf16": {"precision.fp8": "hybrid", "precision.num_layers_at_start_in_bf16": 1},
}
UNSHARED = {"training.share_prompts": False, "training.row_capacity": 96}


@pytest.mark.te
@pytest.mark.parametrize("rows", [{}, UNSHARED], ids=["shared", "thd"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_near_fp32(recipe: str, rows: dict[str, Any], ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    hf = tiny_checkpoint("untied")
    bf16 = errors(make_config(hf, **{"precision.bf16": True}), ranks, tmp_path / "bf16")
    found = errors(make_config(hf, **ENGINE, **RECIPES[recipe], **rows), ranks, tmp_path / "out")
    # Delayed scaling has no earlier step to go by here: its scales are 1.
    most = {"bf16": 3, "delayed": 64}.get(recipe, 32)
    for error, rounded in zip(found, bf16, strict=True):
        assert error < most * rounded


@pytest.mark.te
@pytest.mark.parametrize("recipe", ["bf16", "tensorwise", "delayed"])
@pytest.mark.parametrize("shards", [{}, {"parallel.use_distributed_optimizer": True}], ids=["whole", "sharded"])
def test_resuming(recipe: str, shards: dict[str, Any], ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    config = make_config(tiny_checkpoint("untied"), **ENGINE, **RECIPES[recipe], **shards)
    unbroken = ranks(1).run(train, config, tmp_path / "unbroken")[0]
    resumed = ranks(1).run(train, config, tmp_path / "resumed", 3)[0]
    # Kernels may add in another order from run to run.
    assert resumed == pytest.approx(unbroken, rel=1e-2)
    expected = weights(tmp_path / "unbroken")
    for name, value in weights(tmp_path / "resumed").items():
        assert ((value - expected[name]).norm() / expected[name].norm()).item() < 1e-3, name


@pytest.mark.te
def test_resuming_with_fp8_parameters(ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    flags = {"precision.fp8_param_gather": True, "parallel.use_distributed_optimizer": True}
    config = make_config(tiny_checkpoint("untied"), **ENGINE, **RECIPES["tensorwise"], **flags)
    unbroken = ranks(1).run(train, config, tmp_path / "unbroken")[0]
    assert ranks(1).run(train, config, tmp_path / "resumed", 3)[0] == pytest.approx(unbroken, rel=1e-2)


@pytest.mark.te
def test_fp8_parameters(ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    flags = {"precision.fp8_param_gather": True, "parallel.use_distributed_optimizer": True}
    config = make_config(tiny_checkpoint("untied"), **ENGINE, **RECIPES["tensorwise"], **flags)
    kept = make_config(tiny_checkpoint("untied"), **ENGINE, **RECIPES["tensorwise"])
    found, expected = (ranks(1).run(train, each, tmp_path / "out")[0] for each in (config, kept))
    assert found == pytest.approx(expected, rel=5e-2)


def step_by_step(config: Any) -> float:
    """Largest relative distance between the parameters of a trainer and those of torch's RMSprop on its gradients."""
    import torch

    with in_layout(config.parallel) as topology:
        trainer = _trainer(config, topology)
        settings = config.optimizer
        ours = list(trainer.ddp.module.parameters())
        theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
        judge = torch.optim.RMSprop(theirs, lr=1.0, alpha=settings.rmsprop_smoothing, eps=settings.eps)
        for number in range(4):
            metrics = trainer.train_step(for_method(triplets_of(number), trainer.roles, with_reference=False))
            for mine, other in zip(ours, theirs, strict=True):
                other.grad = mine.main_grad.clone()  # clipped, as the optimizer saw it
            judge.param_groups[0]["lr"] = metrics.learning_rate
            judge.step()
        pairs = zip(ours, theirs, strict=True)
        return max(((mine - other).norm() / other.norm()).item() for mine, other in pairs)


def test_the_optimizer_steps_as_rmsprop(ranks: Any, tiny_checkpoint: Any) -> None:
    """On a GPU with Transformer Engine megatron-core takes its FusedAdam, else torch's AdamW."""
    config = make_config(tiny_checkpoint("untied"), **{"optimizer.lr": 1e-3, "optimizer.clip_grad": 0.0})
    assert ranks(1).run(step_by_step, config)[0] < 1e-6
