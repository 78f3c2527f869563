"""A safetensors file read by position, straight to where the values are wanted.

safetensors maps the whole file into memory, so the pages that a rank has read stay part of its memory until it is done.
Here a rank reads through one small buffer, or into the parameter itself, and holds nothing else.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_tspin.checkpoint.tensor_check import Header, refused_dtype
from megatron_tspin.errors import ArtifactError, InputError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of weights, as safetensors writes them."""
BUFFER_BYTES = 2**19
"""Read at once: small enough to stay in a core's cache while the values are checked and cast."""
_PIECE_BYTES = 2**12
"""Of a row from which on columns are read row by row; shorter ones cost more calls than the rest of the row costs."""
_LENGTH_BYTES = 8  # of the number before the header


@dataclass(frozen=True)
class _Place:
    header: Header
    begin: int
    """Byte of the file."""


class SafetensorsFile:
    """Names, headers and values of a file's tensors. It keeps the file open until it is collected.

    Attributes:
        path: The file.
        headers: Shape and stored type of each tensor by name.

    Raises:
        ArtifactError: The file is torn, or its header does not fit its length.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # compares the header with the file's length, and checks the rest
                pass
            self._stream = path.open("rb", buffering=0)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{path}: not a whole safetensors file ({error}); download it again") from error
        length = int.from_bytes(self._stream.read(_LENGTH_BYTES), "little")
        tree = json.loads(self._stream.read(length))
        self._places = {
            name: _Place(
                Header(tuple(entry["shape"]), entry["dtype"]), _LENGTH_BYTES + length + entry["data_offsets"][0]
            )
            for name, entry in tree.items()
            if name != "__metadata__"
        }

        self.headers = {name: place.header for name, place in self._places.items()}

    def read_into(
        self,
        target: Tensor,
        name: str,
        part: slice | None = None,
        dim: int = 0,
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Reads a tensor, or a part of its rows (`dim` 0) or columns (`dim` 1), and casts it to the target's dtype.

        Args:
            target: Of the part's shape, anywhere; may be a view.
            name: The tensor.
            part: Rows or columns; None is all of it.
            dim: See above.
            progress: Told how many bytes of the part have been read since the last call.

        Raises:
            InputError: It is not of a floating-point type, or holds NaN or an infinity.
        """
        place = self._places[name]
        if place.header.dtype not in DTYPES:
            raise InputError(f"{self.path}: {refused_dtype(name, place.header.dtype)}")
        rows, columns = _matrix(place.header.shape)
        part = part or slice(0, columns if dim else rows)
        if dim:
            self._read_columns(target, name, part, progress)
            return
        wanted = part.stop - part.start
        assert target.numel() == wanted * columns, f"{name}: {list(target.shape)} for {wanted} rows of {columns}"
        if target.is_contiguous():
            self._read_run(target.view(-1), name, part.start * columns, progress)
        else:
            assert target.dim() <= 2, f"{name}: a view of {target.dim()} dimensions"
            for index in range(wanted):
                self._read_run(target[index].view(-1), name, (part.start + index) * columns, progress)

    def _read_run(self, target: Tensor, name: str, first: int, progress: Callable[[int], None]) -> None:
        """Elements that follow each other in the file, from number `first` on, into a vector."""
        place = self._places[name]
        stored = DTYPES[place.header.dtype]
        at_once = BUFFER_BYTES // stored.itemsize
        straight = target.dtype == stored and target.device.type == "cpu" and target.is_contiguous()
        buffer = None if straight else torch.empty(min(at_once, target.numel()), dtype=stored)
        for done in range(0, target.numel(), at_once):
            goal = target[done : done + at_once]
            values = goal if buffer is None else buffer[: goal.numel()]
            self._read_bytes(values, place.begin + (first + done) * stored.itemsize)
            if buffer is not None:
                goal.copy_(values)
            self._check(name, values, values)
            progress(values.nbytes)

    def _read_columns(self, target: Tensor, name: str, part: slice, progress: Callable[[int], None]) -> None:
        """Columns of a matrix, some rows at a time."""
        place = self._places[name]
        stored = DTYPES[place.header.dtype]
        rows, columns = _matrix(place.header.shape)
        width = part.stop - part.start
        by_rows = width * stored.itemsize >= _PIECE_BYTES
        at_once = max(1, BUFFER_BYTES // (columns * stored.itemsize))
        straight = by_rows and target.dtype == stored and target.device.type == "cpu" and target.is_contiguous()
        buffer = None if straight else torch.empty((min(at_once, rows), width if by_rows else columns), dtype=stored)
        if by_rows:
            self._announce(place.begin, rows * columns * stored.itemsize)
        for row in range(0, rows, at_once):
            goal = target[row : row + at_once]
            values = goal if buffer is None else buffer[: len(goal)]
            wanted = values if by_rows else values[:, part]
            begin = place.begin + row * columns * stored.itemsize
            if by_rows:
                self._read_pieces(values, begin + part.start * stored.itemsize, columns * stored.itemsize)
            else:
                self._read_bytes(values, begin)
            if buffer is not None:
                goal.copy_(wanted)
            self._check(name, values, wanted)
            progress(wanted.numel() * stored.itemsize)

    def _announce(self, begin: int, length: int) -> None:
        """Lets the system read bytes ahead: it does not by itself where some of them are left out."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._stream.fileno(), begin, length, os.POSIX_FADV_WILLNEED)

    def _read_pieces(self, values: Tensor, begin: int, stride: int) -> None:
        """Fills each row of a contiguous matrix from `begin` on, every `stride` bytes."""
        view = values.view(torch.uint8).numpy().data.cast("B")
        length = len(view) // len(values)
        descriptor = self._stream.fileno()
        for first in range(0, len(view), length):
            if os.preadv(descriptor, [view[first : first + length]], begin) != length:
                self._fill(view[first : first + length], begin)
            begin += stride

    def _read_bytes(self, values: Tensor, offset: int) -> None:
        """Fills a contiguous tensor from a byte of the file on."""
        self._fill(values.view(torch.uint8).numpy().data.cast("B"), offset)

    def _fill(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._stream.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise ArtifactError(f"{self.path}: ends at byte {offset + done}; it became shorter while it was read")
            done += count

    def _check(self, name: str, values: Tensor, part: Tensor) -> None:
        """Demands that a part of contiguous values is finite.

        A sum that is finite has only finite terms, and costs a tenth of `isfinite`, over all values less than over
        columns. One that is not may also have overflowed, or met what is outside the part; fp16 is summed in fp32.
        """
        if isfinite(float(values.sum(dtype=torch.float32 if values.dtype == torch.float16 else None))):
            return
        bad = int((~part.isfinite()).sum())
        if bad:
            raise InputError(
                f"{self.path}: tensor {name} holds {bad} values that are NaN or infinite; take a checkpoint whose "
                "training went well"
            )


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows, and elements of a row."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)
