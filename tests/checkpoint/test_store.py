"""Distributed checkpoints: every layout loads what every other one saved, and nothing broken is loaded."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from rank_pool import in_layout

from megatron_tspin.checkpoint.manifest import latest_checkpoint, verify_checkpoint
from megatron_tspin.config import OptimizerSection, ParallelSection, TrainingSection
from megatron_tspin.errors import ArtifactError, InputError


def layout(tp: int = 1, pp: int = 1, dp: int = 1, distributed_optimizer: bool = False) -> ParallelSection:
    return ParallelSection(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=dp,
        use_distributed_optimizer=distributed_optimizer,
    )


def build(hf: Path, parallel: ParallelSection, topology: Any, bf16: bool = False) -> Any:
    from megatron_tspin.checkpoint.store import build_policy
    from megatron_tspin.models.hf_config import read_architecture

    return build_policy(read_architecture(hf), parallel, TrainingSection(bf16=bf16), topology)


def wrap(model: Any, parallel: ParallelSection, bf16: bool) -> tuple[Any, Any]:
    """DDP and optimizer, as training builds them."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_tspin.training.optimizer import build_optimizer

    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=False,
    )
    wrapped = DistributedDataParallel(config=model.config, ddp_config=config, module=model)
    return wrapped, build_optimizer(wrapped, OptimizerSection(lr=1e-2), parallel, TrainingSection(bf16=bf16))


def step(wrapped: Any, optimizer: Any, number: int) -> None:
    """An update whose gradient is a function of name, position and step, so the same under every layout."""
    import torch

    from megatron_tspin.training.optimizer import gradient_norm, update

    wrapped.zero_grad_buffer()
    optimizer.zero_grad()
    for parameter in wrapped.parameters():
        parameter.main_grad.copy_(torch.cos(parameter.detach().float() * 37.0 + number))
    gradient_norm(optimizer)
    update(optimizer, norm=0.0, lr=1e-2, clip_grad=0.0)


def whole_parameters(model: Any, topology: Any, hf: Path, target: Path) -> dict[str, Any]:
    """All weights, by way of the export."""
    from safetensors.torch import load_file

    from megatron_tspin.checkpoint.convert import export_hf

    export_hf(model, topology, hf, target, dtype=__import__("torch").float32)
    return {name: tensor.numpy() for name, tensor in load_file(target / "model.safetensors").items()}


def train_and_save(hf: Path, folder: Path, parallel: ParallelSection, bf16: bool, scratch: Path) -> dict[str, Any]:
    """Two steps, a checkpoint, a third step: its weights are the answer."""
    from megatron_tspin.checkpoint.convert import load_hf
    from megatron_tspin.checkpoint.store import save_checkpoint

    with in_layout(parallel) as topology:
        model = build(hf, parallel, topology, bf16)
        load_hf(model, topology)
        wrapped, optimizer = wrap(model, parallel, bf16)
        for number in (1, 2):
            step(wrapped, optimizer, number)
        save_checkpoint(folder, wrapped, topology, optimizer, {"step": 2, "note": "é"})
        step(wrapped, optimizer, 3)
        return whole_parameters(model, topology, hf, scratch) if True else {}


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


LAYOUTS = [
    (layout(), layout(tp=2), False),
    (layout(tp=2), layout(pp=2), False),
    (layout(pp=2), layout(dp=2, distributed_optimizer=True), False),
    (layout(dp=2, distributed_optimizer=True), layout(tp=2), False),
    (layout(dp=2, distributed_optimizer=True), layout(dp=2), True),
    (layout(tp=2), layout(dp=2, distributed_optimizer=True), True),
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
