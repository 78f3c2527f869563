"""Writes a safetensors file tensor by tensor, and holds none of them.

The header is known before the first value, so each tensor goes straight to its place. The bytes are those that
safetensors' own `save_file` writes.
"""

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_tspin.checkpoint.safetensors_file import DTYPES
from megatron_tspin.errors import InputError

Sizes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by name."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # widest first, as safetensors sorts
_ELEMENTS_AT_ONCE = 2**18
_ALIGNMENT = 8  # of the first value


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor's values."""
    return prod(shape) * dtype.itemsize


class SafetensorsStream:
    """A file that takes tensors, or rows of them, in any order; it is whole once it has all of them.

    Args:
        path: The file.
        sizes: What it will hold.
    """

    def __init__(self, path: Path, sizes: Sizes) -> None:
        self.path = path
        self._sizes = sizes
        self._missing = sum(prod(shape) for shape, _ in sizes.values())
        tree: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._begins: dict[str, int] = {}
        begin = 0
        for name in sorted(sizes, key=lambda name: (_RANKS[sizes[name][1]], name)):
            shape, dtype = sizes[name]
            end = begin + num_bytes(shape, dtype)
            tree[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            self._begins[name], begin = begin, end
        header = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % _ALIGNMENT)
        self._first = 8 + len(header)
        self._stream = path.open("wb", buffering=0)
        self._write(len(header).to_bytes(8, "little") + header, 0)

    def add(self, name: str, values: Tensor, row: int = 0) -> bool:
        """Writes rows of a tensor, cast to its announced dtype, from number `row` on; True if nothing is missing now.

        Raises:
            InputError: A value is finite, but not in that dtype.
        """
        shape, dtype = self._sizes[name]
        width = tuple(values.shape[1:])
        assert width == shape[1:] and (not shape or row + len(values) <= shape[0]), f"{name}: {list(values.shape)}"
        offset = self._first + self._begins[name] + row * num_bytes(width, dtype)
        flat = values.detach().reshape(-1)
        for begin in range(0, flat.numel(), _ELEMENTS_AT_ONCE):
            piece = flat[begin : begin + _ELEMENTS_AT_ONCE]
            cast = piece.to(dtype).cpu()
            if dtype != piece.dtype and not cast.isfinite().all():
                raise InputError(
                    f"{self.path}: tensor {name} holds {float(piece.abs().max()):g}, which {_NAMES[dtype]} cannot; "
                    "choose another dtype"
                )
            self._write(cast.view(torch.uint8).numpy().data, offset)
            offset += cast.nbytes
        self._missing -= flat.numel()
        if not self._missing:
            self._stream.close()
        return not self._missing

    def _write(self, values: bytes | memoryview, offset: int) -> None:
        done = 0
        while done < len(values):
            done += os.pwrite(self._stream.fileno(), values[done:], offset + done)
