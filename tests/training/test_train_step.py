"""Steps that must change nothing: no triplet teaches, or something is not finite."""

from typing import Any

import pytest

from tests.rank_pool import in_layout
from tests.training.trajectory import _trainer, for_method, make_config, triplets_of

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel.tensor_model_parallel_size": 2},
    "pp2": {"parallel.pipeline_model_parallel_size": 2},
    "cp2": {"parallel.context_parallel_size": 2},
    "dp2_sharded": {"parallel.data_parallel_size": 2, "parallel.use_distributed_optimizer": True},
    "dp2_padded": {"parallel.data_parallel_size": 2, "training.layout": "padded"},
}


def snapshot(trainer: Any) -> list[Any]:
    """Copies of all weights and all optimizer state of this rank, in a fixed order."""
    import torch

    kept = [parameter.detach().clone() for parameter in trainer.ddp.module.parameters()]
    for part in trainer.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            kept += [state[key].clone() for key in sorted(state) if isinstance(state[key], torch.Tensor)]
    return kept


def same_bits(before: list[Any], after: list[Any]) -> bool:
    import torch

    return len(before) == len(after) > 0 and all(
        torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
        for a, b in zip(before, after, strict=True)
    )


def alike(triplets: list[Any]) -> list[Any]:
    """y' = y = y0 everywhere."""
    from dataclasses import replace

    return [replace(t, responses=dict.fromkeys(t.responses, t.responses["annotated"])) for t in triplets]


def step_that_teaches_nothing(config: Any) -> Any:
    with in_layout(config.parallel) as topology:
        trainer = _trainer(config, topology)
        batch = for_method(triplets_of(0), trainer.roles, with_reference=False)
        first = trainer.train_step(batch)
        before = snapshot(trainer)
        second = trainer.train_step(alike(batch))
        unchanged = same_bits(before, snapshot(trainer))
        third = trainer.train_step(batch)
        return unchanged, same_bits(before, snapshot(trainer)), [first, second, third]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_that_teaches_nothing_is_skipped(layout: str, ranks: Any, tiny_checkpoint: Any) -> None:
    config = make_config(tiny_checkpoint("tied"), **LAYOUTS[layout])
    for unchanged, also_later, steps in ranks(2).run(step_that_teaches_nothing, config):
        assert unchanged and not also_later
        assert [step.update_skipped for step in steps] == [False, True, False]
        assert [step.step for step in steps] == [1, 2, 3]
        assert steps[1].identical_share == 1.0 and steps[2].learning_rate < steps[0].learning_rate


def divergence(config: Any, broken_rank: int) -> Any:
    import torch

    from megatron_tspin.errors import DivergenceError

    with in_layout(config.parallel) as topology:
        trainer = _trainer(config, topology)
        batch = for_method(triplets_of(0), trainer.roles, with_reference=False)
        trainer.train_step(batch)
        if topology.rank == broken_rank:
            with torch.no_grad():
                list(trainer.ddp.module.parameters())[-1].view(-1)[0] = float("nan")
        before = snapshot(trainer)
        try:
            trainer.train_step(batch)
        except DivergenceError as error:
            return str(error), same_bits(before, snapshot(trainer)), trainer.done
        return "no error", False, trainer.done


@pytest.mark.parametrize("broken_rank", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_that_is_not_a_number_stops_all_ranks(
    layout: str, broken_rank: int, ranks: Any, tiny_checkpoint: Any
) -> None:
    config = make_config(tiny_checkpoint("untied"), **LAYOUTS[layout])
    for message, unchanged, done in ranks(2).run(divergence, config, broken_rank):
        assert "iteration 1, step 2: loss nan is not finite; no update was made" in message
        assert message.endswith("Prompts of the batch: 0-0, 0-1, 0-2, 0-3, 0-4, 0-5, 0-6")
        assert unchanged and done == 1


def fewer_micro_batches_than_ranks(config: Any) -> Any:
    with in_layout(config.parallel) as topology:
        trainer = _trainer(config, topology)
        batch = for_method(triplets_of(0), trainer.roles, with_reference=False)[:1]
        return trainer.train_step(batch).model_dump(exclude={"seconds", "tokens_per_second", "packing_efficiency"})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_global_batch_of_one_triplet(layout: str, ranks: Any, tiny_checkpoint: Any) -> None:
    """Fewer micro-batches than replicas or than pipeline stages; the mean is over the one triplet."""
    folder = tiny_checkpoint("untied")
    expected = ranks(1).run(fewer_micro_batches_than_ranks, make_config(folder))[0]
    for found in ranks(2).run(fewer_micro_batches_than_ranks, make_config(folder, **LAYOUTS[layout])):
        assert found["num_triplets"] == 1
        assert found.pop("prompt_share_saved") == pytest.approx(0 if "padded" in layout else 2 / 3)
        known = {name: value for name, value in expected.items() if value is not None and name in found}
        assert {name: found[name] for name in known} == pytest.approx(known, rel=1e-5, abs=1e-5)  # y' = y here
        assert all(value is None for name, value in found.items() if name not in known)
