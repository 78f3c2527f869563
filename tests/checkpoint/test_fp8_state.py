"""Scales of delayed scaling in checkpoints, on layers that hold them as Transformer Engine's do."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import ParallelSection, TrainingSection
from megatron_tspin.config_precision import PrecisionSection
from tests.rank_pool import in_layout

LENGTH = 3


def te_like(hf: Path, parallel: ParallelSection, topology: Any, length: int) -> Any:
    """A policy whose linears of queries, keys and values claim to be FP8 layers of Transformer Engine."""
    from types import SimpleNamespace

    import torch

    from megatron_tspin.models.build import build_policy
    from megatron_tspin.models.hf_config import read_architecture

    policy: Any = build_policy(read_architecture(hf), parallel, TrainingSection(), PrecisionSection(), topology)
    policy.config.fp8, policy.config.fp8_recipe, policy.config.fp8_amax_history_len = "hybrid", "delayed", length

    def prepare(module: Any) -> None:
        def state(tensors: int) -> Any:
            return SimpleNamespace(scale=torch.ones(tensors), amax_history=torch.zeros(length, tensors))

        module.fp8_meta = {}
        module.init_fp8_meta_tensors = lambda recipe: module.fp8_meta.update(scaling_fwd=state(3), scaling_bwd=state(2))

    for layer in policy.decoder.layers:
        prepare(layer.self_attention.linear_qkv)
    return policy


def fill(policy: Any) -> None:
    """Values that tell layer and place apart."""
    for layer in policy.decoder.layers:
        module = layer.self_attention.linear_qkv
        module.init_fp8_meta_tensors(None)
        for number, state in enumerate(module.fp8_meta.values()):
            state.scale += 10 * layer.layer_number + number
            state.amax_history += 100 * layer.layer_number + number


def found(policy: Any) -> dict[int, list[float]]:
    return {
        layer.layer_number: [
            value
            for name in ("scaling_fwd", "scaling_bwd")
            for value in (
                layer.self_attention.linear_qkv.fp8_meta[name].scale[0].item(),
                layer.self_attention.linear_qkv.fp8_meta[name].amax_history[-1, -1].item(),
            )
        ]
        for layer in policy.decoder.layers
        if layer.self_attention.linear_qkv.fp8_meta
    }


def save(hf: Path, folder: Path, parallel: ParallelSection) -> None:
    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.checkpoint.store import save_checkpoint

    with in_layout(parallel) as topology:
        policy = te_like(hf, parallel, topology, LENGTH)
        load_hf(policy, topology)
        fill(policy)
        save_checkpoint(folder, policy, topology)


def load(hf: Path, folder: Path, parallel: ParallelSection, length: int) -> Any:
    from megatron_tspin.checkpoint.store import load_checkpoint

    with in_layout(parallel) as topology:
        policy = te_like(hf, parallel, topology, length)
        load_checkpoint(folder, policy, topology)
        return found(policy)


LAYOUTS = [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {"data_parallel_size": 2}]


@pytest.mark.parametrize(("saving", "loading"), [(0, 1), (1, 2), (2, 0), (3, 3)])
def test_scales_come_back_under_any_layout(
    saving: int, loading: int, ranks: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    hf, folder = tiny_checkpoint("tied"), tmp_path / "step_00000001"
    source, target = (ParallelSection(**LAYOUTS[number]) for number in (saving, loading))
    ranks(source.world_size).run(save, hf, folder, source)
    assert json.loads((folder / "manifest.json").read_text())["facts"]["delayed_scaling"] == LENGTH
    layers: dict[int, list[float]] = {}
    for held in ranks(target.world_size).run(load, hf, folder, target, LENGTH):
        layers |= held
    assert len(layers) >= 2
    assert layers == {n: [1 + 10 * n, 100 * n, 2 + 10 * n, 100 * n + 1] for n in layers}


def test_a_history_of_another_length_starts_afresh(ranks: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    hf, folder = tiny_checkpoint("tied"), tmp_path / "step_00000001"
    ranks(1).run(save, hf, folder, ParallelSection())
    assert ranks(1).run(load, hf, folder, ParallelSection(), LENGTH + 1)[0] == {}
