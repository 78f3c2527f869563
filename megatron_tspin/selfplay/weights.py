"""What the headers of an HF checkpoint's safetensors files tell without torch."""

from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron_tspin.checkpoint.tensor_check import Header, tensor_problems
from megatron_tspin.checkpoint.weight_files import weight_files
from megatron_tspin.errors import InputError
from megatron_tspin.models.architecture import Architecture

_SHOWN = 20


def check_weights(folder: Path, architecture: Architecture | None) -> None:
    """Refuses a checkpoint whose safetensors files are missing, cut short, or not those of its config.json.

    Args:
        folder: The HF folder.
        architecture: What its config.json describes; None compares nothing with it.

    Raises:
        InputError: Names each file and each tensor.
    """
    problems: list[str] = []
    headers: dict[str, Header] = {}
    for path in weight_files(folder):
        try:
            headers |= _headers(path)
        except InputError as error:
            problems.append(str(error))
    if not problems and architecture is not None:
        found = list(tensor_problems(headers, architecture))
        problems = [f"{folder}: {line}" for line in found[:_SHOWN]]
        if len(found) > _SHOWN:
            problems.append(f"{folder}: and {len(found) - _SHOWN} more")
    if problems:
        raise InputError("\n".join(problems))


def count_parameters(folder: Path) -> int:
    """Number of parameters in a checkpoint.

    Raises:
        InputError: A file is missing or cut short.
    """
    return sum(prod(header.shape) for path in weight_files(folder) for header in _headers(path).values())


def _headers(path: Path) -> dict[str, Header]:
    """What a file's header says of its tensors; opening it compares the header with the file's length."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; the checkpoint is incomplete, download it again")
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: Header(tuple(each.get_shape()), str(each.get_dtype())) for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise InputError(f"{path}: not a whole safetensors file ({size} bytes): {error}; download it again") from error
