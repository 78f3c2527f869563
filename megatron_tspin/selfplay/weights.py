"""What the headers of an HF checkpoint's safetensors files tell without torch."""

import json
import struct
from pathlib import Path

from megatron_tspin.checkpoint.weight_files import weight_files
from megatron_tspin.errors import InputError

_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # the format's own limit


def check_weights(folder: Path) -> None:
    """Refuses a checkpoint whose safetensors files are missing or cut short; all problems in one message.

    Raises:
        InputError: Names each file.
    """
    problems = []
    for path in weight_files(folder):
        try:
            _header(path)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))


def count_parameters(folder: Path) -> int:
    """Number of parameters in a checkpoint.

    Raises:
        InputError: A file is missing or cut short.
    """
    total = 0
    for path in weight_files(folder):
        for shape in _header(path).values():
            size = 1
            for length in shape:
                size *= length
            total += size
    return total


def _header(path: Path) -> dict[str, list[int]]:
    """Shape of each tensor of a file that is as long as its header says."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; the checkpoint is incomplete, download it again")
    actual = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(_LENGTH_BYTES)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == _LENGTH_BYTES else 0
        if not 0 < length <= min(_LONGEST_HEADER, actual):
            raise InputError(f"{path}: not a whole safetensors file ({actual} bytes); download it again")
        try:
            header = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            promised = _LENGTH_BYTES + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            shapes = {name: [int(size) for size in entry["shape"]] for name, entry in tensors.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"{path}: its safetensors header cannot be read; download it again") from error
    if promised != actual:
        raise InputError(f"{path}: {actual} bytes, but its header promises {promised}; download it again")
    return shapes
