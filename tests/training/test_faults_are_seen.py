"""The bounds of `tests.rounding` are narrow enough: each of these faults, put into a run, is far outside of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_tspin.config import Config
from tests.rounding import BOUNDS, update_errors
from tests.training.trajectory import make_config, train, train_plainly, weights

TP2 = {"parallel.tensor_model_parallel_size": 2}
DP2 = {"parallel.data_parallel_size": 2}
MARGIN = 3.0
"""A fault counts as seen when it is this many times the bound."""


def _finalizing() -> Any:
    """megatron-core's module, whose package has a function of the same name."""
    return import_module("megatron.core.distributed.finalize_model_grads")


@contextmanager
def no_sum_over_tp() -> Iterator[None]:
    """The gradients of norms are those of this TP rank's part of the sequence."""
    with patch.object(_finalizing(), "_allreduce_non_tensor_model_parallel_grads", lambda *_: None):
        yield


@contextmanager
def no_sum_over_dp() -> Iterator[None]:
    """Each replica updates its weights by its own triplets."""
    from megatron.core.distributed import DistributedDataParallel

    with patch.object(DistributedDataParallel, "finish_grad_sync", lambda *_, **__: None):
        yield


@contextmanager
def no_sum_over_tied_embeddings() -> Iterator[None]:
    """The first pipeline stage does not hear of the head's gradient, nor the last of the embedding's."""
    with patch.object(_finalizing(), "_allreduce_word_embedding_grads", lambda *_: None):
        yield


@contextmanager
def too_many_triplets() -> Iterator[None]:
    """Gradients are divided by more triplets than there are, one more in each micro-batch."""
    from megatron_tspin.objective import forward

    original = forward.loss_func

    def loss_func(*args: Any) -> Any:
        loss, count, sums = original(*args)
        return loss, count + 1, sums

    with patch.object(forward, "loss_func", loss_func):
        yield


@contextmanager
def a_micro_batch_is_lost() -> Iterator[None]:
    """The last micro-batch of a replica is not run; the rest is divided by what there is."""
    from megatron_tspin.objective.batches import BatchPlanner

    plan = BatchPlanner.plan
    with patch.object(BatchPlanner, "plan", lambda planner, triplets: plan(planner, triplets)[:-1]):
        yield


@contextmanager
def clipped_by_a_part_of_the_norm() -> Iterator[None]:
    """The norm that clips misses 1 % of what there is."""
    from megatron_tspin.training import loop

    gradient_norm = loop.gradient_norm
    with patch.object(loop, "gradient_norm", lambda optimizer: 0.99 * gradient_norm(optimizer)):
        yield


@contextmanager
def not_clipped() -> Iterator[None]:
    """The gradient is taken as it is."""
    from megatron_tspin.training import loop

    update = loop.update
    with patch.object(loop, "update", lambda optimizer, norm, rate, _: update(optimizer, norm, rate, 0.0)):
        yield


@contextmanager
def alpha_is_off() -> Iterator[None]:
    """Margins are a hundredth larger than the formula says."""
    from megatron_tspin.objective import forward

    losses = forward.triplet_losses

    def off(objective: Any, *args: Any) -> Any:
        return losses(objective.model_copy(update={"alpha": 1.01 * objective.alpha}), *args)

    with patch.object(forward, "triplet_losses", off):
        yield


FAULTS: dict[Any, tuple[str, dict[str, Any]]] = {
    no_sum_over_tp: ("untied", {**TP2, "parallel.sequence_parallel": True}),
    no_sum_over_dp: ("untied", DP2),
    no_sum_over_tied_embeddings: ("tied", {"parallel.pipeline_model_parallel_size": 2}),
    too_many_triplets: ("untied", {}),
    a_micro_batch_is_lost: ("untied", {}),
    clipped_by_a_part_of_the_norm: ("untied", {}),
    not_clipped: ("untied", {}),
    alpha_is_off: ("untied", {}),
}


def train_with(fault: Any, config: Config, export: Path) -> list[float]:
    """On ranks: `train` with a fault in it."""
    with fault():
        return train(config, export)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_seen(fault: Any, ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    kind, settings = FAULTS[fault]
    config = make_config(tiny_checkpoint(kind), **settings)
    ranks(config.parallel.world_size).run(train_with, fault, config, tmp_path / "out")
    errors = update_errors(weights(tmp_path / "out"), train_plainly(config)[1], weights(tiny_checkpoint(kind)))
    assert max(errors.values()) > MARGIN * BOUNDS["update"], max(errors.values())
