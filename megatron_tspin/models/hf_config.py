"""Reads an HF `config.json` into an `Architecture`, and refuses by name whatever is not implemented.

No torch here: the driver checks a checkpoint before any stage starts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tspin.errors import InputError
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families.config_reader import ConfigReader
from megatron_tspin.models.families.registry import FAMILIES
from megatron_tspin.storage import read_json

_REASONS = {
    "gemma3": "only its text part is; save `model.language_model` with its text_config, which transformers calls "
    "gemma3_text",
    "deepseek_v2": "nor are its latent attention and shared experts",
    "deepseek_v3": "nor are its latent attention, shared experts and expert biases",
}


def read_architecture(folder: Path) -> Architecture:
    """Reads `config.json` of an HF checkpoint.

    Raises:
        InputError: The folder or the file is missing, a value is absent, or something is not implemented. All problems
            are in one message, each naming the file, the key and the value.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; model.hf_checkpoint must be a folder with config.json")
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return read_config(config, path)


def read_config(config: Mapping[str, Any], path: Path) -> Architecture:
    """The architecture that a config describes.

    Args:
        config: As in config.json.
        path: Where it comes from; its folder becomes the architecture's.

    Raises:
        InputError: As `read_architecture`.
    """
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        reason = f"; {_REASONS[name]}" if isinstance(name, str) and name in _REASONS else ""
        raise InputError(
            f"{path}: model_type = {name!r} is not implemented{reason}; implemented are {', '.join(FAMILIES)}"
        )
    reader = ConfigReader(config)
    reader.raw("model_type")
    architecture = family.read(reader)
    problems = reader.problems + reader.left_over(tuple(family.neutral))
    if problems:
        raise InputError("\n".join(f"{path}: {problem}" for problem in dict.fromkeys(problems)))
    return architecture.at(path.parent)
