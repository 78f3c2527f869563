"""Policies of known shapes with random weights, alone in this process: no checkpoint is needed."""

import atexit
import hashlib
import os
import tempfile
from contextlib import ExitStack
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megatron_tspin.benchmark.gpu_report.case import SkippedError
from megatron_tspin.benchmark.own_side import ALONE
from megatron_tspin.config import ParallelSection, TrainingSection
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.errors import InputError
from megatron_tspin.models.hf_config import Architecture, read_architecture
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.parallel import Topology, distributed
from megatron_tspin.platform import device
from megatron_tspin.precision import check_machine, uses_transformer_engine
from megatron_tspin.storage import write_json

SMOLLM2 = "SmolLM2-135M"
MISTRAL = "Mistral-7B"
TINY = "tiny"

_STANDARD_DEVIATION = 0.02
_ROWS_MULTIPLE = 32
"""Of row lengths: what any FP8 recipe takes, so that every number format computes the same rows."""

_SHAPES: dict[str, dict[str, Any]] = {
    SMOLLM2: {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
    },
    MISTRAL: {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    },
    TINY: {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    },
}
_POSITIONS = 16384

_open = ExitStack()


@cache
def architecture(shape: str, layers: int | None = None) -> Architecture:
    """An architecture of a known shape; its config.json lies in a folder that goes with this process.

    Args:
        shape: `SMOLLM2`, `MISTRAL` or `TINY`.
        layers: Instead of the shape's own.
    """
    config = {**_SHAPES[shape], "max_position_embeddings": _POSITIONS, "hidden_act": "silu", "rope_theta": 10000.0}
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
    os.environ |= ALONE
    atexit.register(_open.close)
    return _open.enter_context(distributed(parallel(), tokens_multiple=_ROWS_MULTIPLE))


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
