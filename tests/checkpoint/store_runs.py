"""Policies and optimizers to save and load, and steps that are the same under every layout."""

from pathlib import Path
from typing import Any

from megatron_tspin.config import OptimizerSection, ParallelSection, TrainingSection
from megatron_tspin.config_precision import PrecisionSection


def layout(tp: int = 1, pp: int = 1, dp: int = 1, distributed_optimizer: bool = False) -> ParallelSection:
    return ParallelSection(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=dp,
        use_distributed_optimizer=distributed_optimizer,
    )


def build(hf: Path, parallel: ParallelSection, topology: Any, bf16: bool = False) -> Any:
    from megatron_tspin.models.build import build_policy
    from megatron_tspin.models.hf_config import read_architecture

    return build_policy(read_architecture(hf), parallel, TrainingSection(), PrecisionSection(bf16=bf16), topology)


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
    kind = "rmsprop" if model.architecture.tied_embeddings else "adam"  # Adam needs the step: bias correction
    settings = OptimizerSection(optimizer=kind, lr=1e-2)
    return wrapped, build_optimizer([wrapped], settings, parallel, PrecisionSection(bf16=bf16))


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
    import torch
    from safetensors.torch import load_file

    from megatron_tspin.checkpoint.hf_weights import export_hf

    export_hf(model, topology, hf, target, dtype=torch.float32)
    return {name: tensor.numpy() for name, tensor in load_file(target / "model.safetensors").items()}
