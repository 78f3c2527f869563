"""RMSProp is torch's, the decay is decoupled, and bf16 keeps its masters and gradients in fp32."""

from pathlib import Path
from typing import Any

import pytest

from tests.rank_pool import in_layout
from tests.training.trajectory import _trainer, for_method, make_config, triplets_of

TP2 = {"parallel.tensor_model_parallel_size": 2}
SHARDED = {"parallel.data_parallel_size": 2, "parallel.use_distributed_optimizer": True}


def rmsprop_against_torch(weight_decay: float) -> list[float]:
    """Largest relative difference to torch.optim.RMSprop after each of six steps."""
    import torch

    from megatron_tspin.training.optimizer import RMSProp

    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((5, 3), (7,), (1,))]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    optimizer = RMSProp(ours, lr=1e-3, betas=(0.0, 0.9), eps=1e-6, weight_decay=weight_decay)
    judge = torch.optim.RMSprop(theirs, lr=1e-3, alpha=0.9, eps=1e-6)
    differences = []
    for step in range(6):
        rate = 1e-3 * (step + 1)
        optimizer.param_groups[0]["lr"] = judge.param_groups[0]["lr"] = rate
        for mine, other in zip(ours, theirs, strict=True):
            gradient = torch.randn(mine.shape, generator=generator) * 10.0 ** (step - 3)
            mine.grad, other.grad = gradient, gradient.clone()
            other.data.mul_(1 - rate * weight_decay)
        if step == 4:  # a parameter without gradient stays
            ours[1].grad = theirs[1].grad = None
            theirs[1].data.div_(1 - rate * weight_decay)
        optimizer.step()
        judge.step()
        pairs = zip(ours, theirs, strict=True)
        differences.append(max(((a - b).norm() / b.norm()).item() for a, b in pairs))
    assert all(set(optimizer.state[parameter]) == {"step", "exp_avg_sq"} for parameter in ours)
    assert [optimizer.state[parameter]["step"].item() for parameter in ours] == [6, 5, 6]
    return differences


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_rmsprop_is_that_of_torch(weight_decay: float, ranks: Any) -> None:
    assert max(ranks(1).run(rmsprop_against_torch, weight_decay)[0]) < 1e-6


def decay_by_dimension(config: Any) -> Any:
    """Number of dimensions of the parameters in a group -> the group's decay, and one step's effect of it alone."""
    import torch

    with in_layout(config.parallel) as topology:
        trainer = _trainer(config, topology)
        groups = [group for part in trainer.optimizer.chained_optimizers for group in part.param_groups]
        found = {(p.dim(), group["weight_decay"]) for group in groups for p in group["params"]}
        before = {name: p.clone() for name, p in trainer.ddp.module.named_parameters()}
        trainer.ddp.zero_grad_buffer()
        trainer.optimizer.zero_grad()
        trainer.optimizer.prepare_grads()
        from megatron_tspin.training.optimizer import update

        update(trainer.optimizer, 0.0, 0.1, 0.0)
        changed = {}
        for name, parameter in trainer.ddp.module.named_parameters():
            factor = 0.5 if parameter.dim() > 1 else 1.0
            changed[name] = torch.allclose(parameter, before[name] * factor, rtol=1e-6, atol=0)
        return found, changed


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_matrices_decay_and_norms_do_not(optimizer: str, ranks: Any, tiny_checkpoint: Any) -> None:
    settings = {"optimizer.optimizer": optimizer, "optimizer.weight_decay": 5.0}
    found, changed = ranks(1).run(decay_by_dimension, make_config(tiny_checkpoint("untied"), **settings))[0]
    assert found == {(1, 0.0), (2, 5.0)}
    assert all(changed.values()), [name for name, right in changed.items() if not right]


def train_in_bf16(config: Any) -> Any:
    """Types of weights, masters and gradient buffers, and the losses of some steps on one batch."""
    import torch

    with in_layout(config.parallel) as topology:
        trainer = _trainer(config, topology)
        batch = for_method(triplets_of(0), trainer.roles, with_reference=False)
        losses = [trainer.train_step(batch).loss for _ in range(trainer.num_steps)]
        policy = trainer.ddp.module
        masters = [p for part in trainer.optimizer.chained_optimizers for p in part.get_parameters()]
        inner = [group for part in trainer.optimizer.chained_optimizers for group in part.optimizer.param_groups]
        finer = sum(
            (p.float() != p.float().bfloat16().float()).sum().item() for group in inner for p in group["params"]
        )
        return {
            "weights": {p.dtype for p in policy.parameters()} == {torch.bfloat16},
            "masters": {p.dtype for group in inner for p in group["params"]} == {torch.float32} and bool(masters),
            "gradients": {p.main_grad.dtype for p in policy.parameters()} == {torch.float32},
            "masters hold more than bf16": finer > 0,
            "losses": losses,
        }


@pytest.mark.parametrize("layout", [{}, TP2, SHARDED], ids=["tp1", "tp2", "dp2 sharded"])
def test_bf16(layout: dict[str, Any], ranks: Any, tiny_checkpoint: Any) -> None:
    config = make_config(tiny_checkpoint("tied"), **{"precision.bf16": True, "optimizer.lr": 3e-4, **layout})
    for found in ranks(config.parallel.world_size).run(train_in_bf16, config):
        losses = found.pop("losses")
        assert all(found.values()), found
        assert losses[-1] < losses[0]


def clipped(config: Any, folder: Path) -> Any:
    """The norm that was reported and the norm of the gradients that the optimizer saw."""
    import torch

    with in_layout(config.parallel) as topology:
        trainer = _trainer(config, topology)
        batch = for_method(triplets_of(0), trainer.roles, with_reference=False)
        norm = trainer.train_step(batch).grad_norm
        seen = torch.cat([p.main_grad.flatten() for p in trainer.ddp.module.parameters()])
        return norm, seen.norm().item()


@pytest.mark.parametrize("limit", [0.0, 1e-3])
def test_gradients_are_clipped_by_their_global_norm(
    limit: float, ranks: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    config = make_config(tiny_checkpoint("untied"), **{"optimizer.clip_grad": limit})
    norm, seen = ranks(1).run(clipped, config, tmp_path)[0]
    assert norm > 0.01, "otherwise nothing is clipped"
    assert seen == pytest.approx(limit or norm, rel=1e-3)
