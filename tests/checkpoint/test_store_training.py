"""Training goes on from checkpoints, inside an iteration and from one to the next, under any layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import ParallelSection
from tests.checkpoint.store_runs import build, layout, step, whole_parameters, wrap
from tests.rank_pool import in_layout


def train_and_save(hf: Path, folder: Path, parallel: ParallelSection, bf16: bool, scratch: Path) -> dict[str, Any]:
    """Two steps, a checkpoint, a third step: its weights are the answer."""
    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.checkpoint.store import save_checkpoint

    with in_layout(parallel) as topology:
        model = build(hf, parallel, topology, bf16)
        load_hf(model, topology)
        wrapped, optimizer = wrap(model, parallel, bf16)
        for number in (1, 2):
            step(wrapped, optimizer, number)
        save_checkpoint(folder, wrapped, topology, optimizer, {"step": 2, "note": "é"})
        step(wrapped, optimizer, 3)
        return whole_parameters(model, topology, hf, scratch)


def load_and_train(hf: Path, folder: Path, parallel: ParallelSection, bf16: bool, scratch: Path) -> tuple[Any, Any]:
    from megatron_tspin.checkpoint.store import load_checkpoint

    with in_layout(parallel) as topology:
        model = build(hf, parallel, topology, bf16)
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        wrapped, optimizer = wrap(model, parallel, bf16)
        state = load_checkpoint(folder, wrapped, topology, optimizer)
        step(wrapped, optimizer, 3)
        return state, whole_parameters(model, topology, hf, scratch)


def finish_iteration(hf: Path, folder: Path, parallel: ParallelSection) -> Any:
    """Two steps in bf16, then what an iteration ends with; this rank's masters by parameter."""
    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.checkpoint.store import save_checkpoint

    with in_layout(parallel) as topology:
        model = build(hf, parallel, topology, bf16=True)
        load_hf(model, topology)
        wrapped, optimizer = wrap(model, parallel, bf16=True)
        for number in (1, 2):
            step(wrapped, optimizer, number)
        save_checkpoint(folder, wrapped, topology, masters=optimizer)


def start_iteration(hf: Path, folder: Path, parallel: ParallelSection) -> Any:
    """Whether parameters and masters of a new optimizer are those of the checkpoint, and whether it has a state."""
    import torch

    from megatron_tspin.checkpoint.store import load_checkpoint, load_masters

    with in_layout(parallel) as topology:
        exact = build(hf, parallel, topology)
        load_checkpoint(folder, exact, topology)
        model = build(hf, parallel, topology, bf16=True)
        wrapped, optimizer = wrap(model, parallel, bf16=True)
        load_masters(folder, wrapped, topology, optimizer)
        rounded = [
            torch.equal(ours, wanted.bfloat16())
            for ours, wanted in zip(model.parameters(), exact.parameters(), strict=True)
        ]
        finer = any(not torch.equal(p, p.bfloat16().float()) for p in exact.parameters())
        (part,) = optimizer.chained_optimizers
        started = any(part.optimizer.state.values())
        masters = {
            name: (ours.main_param, wanted.detach().flatten())
            for (name, ours), wanted in zip(model.named_parameters(), exact.parameters(), strict=True)
            if getattr(ours, "main_param", None) is not None
        }
        same = {
            name: torch.isin(master.flatten(), wanted).all().item() if parallel.use_distributed_optimizer
            else torch.equal(master.flatten(), wanted)
            for name, (master, wanted) in masters.items()
        }  # fmt: skip
        step(wrapped, optimizer, 3)
        return all(rounded), finer, started, same


ITERATIONS = [
    (layout(), layout(tp=2)),
    (layout(tp=2), layout()),
    (layout(dp=2, distributed_optimizer=True), layout(pp=2)),
    (layout(pp=2), layout(dp=2, distributed_optimizer=True)),
]


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize(("saving", "loading"), ITERATIONS, ids=range(len(ITERATIONS)))
def test_master_weights_pass_from_iteration_to_iteration(ranks, tiny_checkpoint, tmp_path, saving, loading, kind):
    hf, folder = tiny_checkpoint(kind), tmp_path / "step_00000002"
    ranks(saving.world_size).run(finish_iteration, hf, folder, saving)
    assert json.loads((folder / "manifest.json").read_text())["facts"]["dtype"] == "float32"
    for rounded, finer, started, same in ranks(loading.world_size).run(start_iteration, hf, folder, loading):
        assert rounded, "parameters are the masters rounded to bf16"
        assert finer, "otherwise nothing is tested"
        assert same and all(same.values()), same
        assert not started


def start_with_fused_optimizer(hf: Path, folder: Path) -> Any:
    """As an iteration starts where megatron-core took a fused optimizer, which counts steps in its groups alone."""
    import torch

    from megatron_tspin.checkpoint.store import load_masters

    class Fused(torch.optim.Optimizer):
        """Refuses, as Transformer Engine's FusedAdam does, a state that it does not know."""

        def load_state_dict(self, state_dict: Any) -> None:
            unknown = {name for state in state_dict["state"].values() for name in state} - {"exp_avg", "exp_avg_sq"}
            if unknown:
                raise KeyError(unknown)
            super().load_state_dict(state_dict)

    with in_layout(layout()) as topology:
        model = build(hf, layout(), topology, bf16=True)
        wrapped, optimizer = wrap(model, layout(), bf16=True)
        (part,) = optimizer.chained_optimizers
        part.optimizer.__class__ = Fused
        load_masters(folder, wrapped, topology, optimizer)
        finer = any(not torch.equal(p.main_param, p.main_param.bfloat16().float()) for p in model.parameters())
        return finer, bool(part.optimizer.state)


def test_masters_load_into_fused_optimizers(ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    hf, folder = tiny_checkpoint("untied"), tmp_path / "step_00000002"
    ranks(1).run(finish_iteration, hf, folder, layout())
    finer, started = ranks(1).run(start_with_fused_optimizer, hf, folder)[0]
    assert finer and not started


LAYOUTS = [
    (layout(), layout(tp=2), False),
    (layout(tp=2), layout(pp=2), False),
    (layout(pp=2), layout(dp=2, distributed_optimizer=True), False),
    (layout(dp=2, distributed_optimizer=True), layout(tp=2), False),
    (layout(dp=2, distributed_optimizer=True), layout(dp=2), True),
    (layout(tp=2), layout(dp=2, distributed_optimizer=True), True),
    (layout(tp=2, dp=2, distributed_optimizer=True), layout(dp=2, distributed_optimizer=True), True),
    (layout(dp=2, distributed_optimizer=True), layout(tp=2, dp=2, distributed_optimizer=True), True),
]


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize(("saving", "loading", "bf16"), LAYOUTS, ids=range(len(LAYOUTS)))
def test_training_continues_under_another_layout(ranks, tiny_checkpoint, tmp_path, saving, loading, bf16, kind):
    hf, folder = tiny_checkpoint(kind), tmp_path / "step_00000002"
    straight = ranks(saving.world_size).run(train_and_save, hf, folder, saving, bf16, tmp_path / "a")[0]
    results = ranks(loading.world_size).run(load_and_train, hf, folder, loading, bf16, tmp_path / "b")
    state, continued = results[0]
    assert all(result[0] == {"step": 2, "note": "é"} for result in results)
    assert straight.keys() == continued.keys()
    for name in straight:
        assert (straight[name] == continued[name]).all(), name
