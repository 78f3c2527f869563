"""This rank's part of a policy, built on its device; its weights come from a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from megatron_tspin.config import ParallelSection, TrainingSection
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.models.provider import make_model_provider
from megatron_tspin.parallel import Topology
from megatron_tspin.platform import device
from megatron_tspin.precision import check_machine, check_transformer_engine


def build_policy(
    architecture: Architecture,
    parallel: ParallelSection,
    training: TrainingSection,
    precision: PrecisionSection,
    topology: Topology,
) -> PolicyModel:
    """This rank's part of the policy on its device, its weights still undefined.

    Raises:
        InputError: The layout does not fit the architecture.
    """
    (model,) = build_chunks(architecture, parallel, training, precision, topology)
    return model


def build_chunks(
    architecture: Architecture,
    parallel: ParallelSection,
    training: TrainingSection,
    precision: PrecisionSection,
    topology: Topology,
) -> list[PolicyModel]:
    """As `build_policy`, a model for each virtual stage of this rank, in the order of its layers."""
    architecture.check_layout(parallel)
    architecture.check_precision(parallel, precision)
    check_machine(precision)
    if training.packed_attention == "thd":
        check_transformer_engine("training.packed_attention = thd", "--tspin-packed-attention auto")
    provide = make_model_provider(architecture, parallel, training, precision)
    last = topology.num_virtual_stages - 1
    chunks = [
        provide(
            pre_process=topology.is_first_pipeline_stage and stage == 0,
            post_process=topology.is_last_pipeline_stage and stage == last,
            vp_stage=stage if last else None,
        )
        for stage in range(last + 1)
    ]
    for chunk in chunks:
        chunk.to(device())
    return chunks


@contextmanager
def without_storage(vocabulary_rows: int) -> Iterator[None]:
    """Policies built within the block have parameters of one element, seen as many: their `data` is to be replaced.

    Args:
        vocabulary_rows: Matrices with so many rows keep their storage: while a model is built, megatron-core exchanges
            tied embeddings over PP.
    """

    def shrink(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
        if parameter is not None and parameter.shape[0] != vocabulary_rows:
            parameter.data = parameter.data.new_empty(1).expand(parameter.shape)

    handle = register_module_parameter_registration_hook(shrink)
    try:
        yield
    finally:
        handle.remove()
