"""Over which ranks a policy is spread while it answers."""

import os
from pathlib import Path

import torch

from megatron_tspin.config import Config, ParallelSection
from megatron_tspin.log import get_logger
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.models.sizes import num_parameters
from megatron_tspin.platform import has_cuda

_SHARE = 0.6
"""Of a rank's memory that weights may take; the rest is for keys and values, activations and logits."""
_GIB = 2**30

_log = get_logger(__name__)


def generation_layout(config: Config) -> ParallelSection:
    """The layout of the stages that only run the policy forward, for the ranks that were started.

    Pipeline stages and context parallelism are folded into DP: one rank's weights are enough to answer, and replicas
    need not wait for each other. Where they are too large for a rank, training's pipeline stays.
    """
    folded, staged = config.generation_layout(), config.generation_layout(folded=False)
    if folded == staged or folded.world_size != staged.world_size:
        return folded
    parameters = num_parameters(read_architecture(Path(config.model.hf_checkpoint)))
    weights = parameters * (2 if config.precision.bf16 else 4) / folded.tensor_model_parallel_size
    room = _SHARE * _memory_bytes()
    fits = weights <= room
    if os.environ.get("RANK", "0") == "0":
        _log.info(
            "weights of a whole policy take %.1f GiB a rank, and there is room for %.1f: %s",
            weights / _GIB,
            room / _GIB,
            "answered by DP alone" if fits else "the pipeline of training stays",
        )
    return folded if fits else staged


def _memory_bytes() -> float:
    """Memory of this rank's device, or its share of the machine's."""
    if has_cuda():
        return float(torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
