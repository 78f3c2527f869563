"""Policies of known shapes with random weights, alone in this process: no checkpoint is needed."""

import atexit
import hashlib
import tempfile
from contextlib import ExitStack
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megatron_tspin.benchmark.alone import alone
from megatron_tspin.benchmark.gpu_report.check import SkippedError
from megatron_tspin.config import ParallelSection, TrainingSection
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.errors import InputError
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.parallel import Topology
from megatron_tspin.platform import device
from megatron_tspin.precision import check_machine, uses_transformer_engine
from megatron_tspin.storage import write_json

SMOLLM2 = "SmolLM2-135M"
MISTRAL = "Mistral-7B"
TINY = "tiny"

_STANDARD_DEVIATION = 0.02
_ROWS_MULTIPLE = 32
"""Of row lengths: what any FP8 recipe takes, so that every number format computes the same rows."""

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    SMOLLM2: (
        (49152, 576, 1536, 30, 9),
        {"model_type": "llama", "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    MISTRAL: (
        (32000, 4096, 14336, 32, 32),
        {"model_type": "mistral", "num_key_value_heads": 8, "tie_word_embeddings": False, "sliding_window": None},
    ),
    TINY: (
        (256, 64, 128, 2, 4),
        {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": False},
    ),
}
_COMMON = {"rms_norm_eps": 1e-5, "max_position_embeddings": 16384, "hidden_act": "silu", "rope_theta": 10000.0}

_open = ExitStack()


@cache
def architecture(shape: str, layers: int | None = None) -> Architecture:
    """An architecture of a known shape; its config.json lies in a folder that goes with this process.

    Args:
        shape: `SMOLLM2`, `MISTRAL` or `TINY`.
        layers: Instead of the shape's own.
    """
    sizes, rest = _SHAPES[shape]
    config = dict(zip(_SIZES, sizes, strict=True)) | rest | _COMMON
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    folder = Path(_open.enter_context(tempfile.TemporaryDirectory(prefix="tspin_shape_")))
    write_json(folder / "config.json", config)
    return read_architecture(folder)


@cache
def parallel() -> ParallelSection:
    """One rank; without a GPU with one thread, as the figures mean nothing then."""
    return ParallelSection()


@cache
def topology() -> Topology:
    """Makes this process a world of its own, until it ends."""
    atexit.register(_open.close)
    return _open.enter_context(alone(parallel(), _ROWS_MULTIPLE))


def require(precision: PrecisionSection) -> None:
    """Demands what a number format needs.

    Raises:
        SkippedError: It is not here.
    """
    if uses_transformer_engine(precision) and find_spec("transformer_engine") is None:
        raise SkippedError("Transformer Engine is not installed")
    try:
        check_machine(precision)
    except InputError as error:
        raise SkippedError(str(error)) from error


def random_policy(
    shape: Architecture, precision: PrecisionSection, training: TrainingSection | None = None
) -> PolicyModel:
    """A policy on this device with the weights that `fill` gives it.

    Raises:
        SkippedError: Its number format cannot be had here.
    """
    require(precision)
    topology()
    from megatron_tspin.models.provider import make_model_provider

    policy = make_model_provider(shape, parallel(), training or TrainingSection(), precision)()
    fill(policy)
    policy.to(device())
    return policy


@torch.no_grad()
def fill(policy: torch.nn.Module) -> None:
    """Fills the parameters: norms with ones, the rest with normal numbers of standard deviation 0.02.

    The numbers depend on the parameter's name and the kind of device alone, and are representable in bf16, so that a
    policy has the same weights in every number format.
    """
    for name, parameter in policy.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
            continue
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
        generator = torch.Generator(parameter.device).manual_seed(seed)
        values = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        parameter.copy_(values.mul_(_STANDARD_DEVIATION).bfloat16())
