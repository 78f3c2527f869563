"""What the headers of an HF checkpoint's safetensors files tell without torch."""

from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron_tspin.checkpoint.weight_files import weight_files
from megatron_tspin.errors import InputError


def check_weights(folder: Path) -> None:
    """Refuses a checkpoint whose safetensors files are missing or cut short; all problems in one message.

    Raises:
        InputError: Names each file.
    """
    problems = []
    for path in weight_files(folder):
        try:
            _parameters(path)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))


def count_parameters(folder: Path) -> int:
    """Number of parameters in a checkpoint.

    Raises:
        InputError: A file is missing or cut short.
    """
    return sum(_parameters(path) for path in weight_files(folder))


def _parameters(path: Path) -> int:
    """Number of parameters in a file, from its header alone; opening it compares the header with the file's length."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; the checkpoint is incomplete, download it again")
    try:
        with safe_open(path, framework="numpy") as file:
            return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise InputError(f"{path}: not a whole safetensors file ({size} bytes): {error}; download it again") from error
