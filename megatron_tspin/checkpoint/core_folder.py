"""The tensors of a distributed checkpoint, one at a time, in a single process and without a model.

megatron-core stores parts of tensors; here the parts are put together, under the names and shapes of the whole tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_tspin.checkpoint import safe_pickle
from megatron_tspin.checkpoint.manifest import check_checkpoint
from megatron_tspin.checkpoint.safetensors_file import DTYPES
from megatron_tspin.checkpoint.tensor_check import Header
from megatron_tspin.errors import ArtifactError

_STATE = ("optimizer.", "fp8_state.")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Part:
    """A block of a tensor and where it lies."""

    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    begin: int
    """Byte of the file."""
    length: int
    """Bytes."""

    @property
    def where(self) -> tuple[slice, ...]:
        """The block as an index into the tensor."""
        return tuple(slice(first, first + size) for first, size in zip(self.offset, self.shape, strict=True))


class CoreFolder:
    """Names, shapes, types and values of the weights; what the optimizer left beside them is passed over.

    Attributes:
        folder: The checkpoint.
        manifest: What the manifest says.
        headers: Shape and type of each weight by name, under safetensors' names of types.
        parts: Of all weights, in the order of the files.

    Raises:
        ArtifactError: The checkpoint is not whole, or its metadata is not what megatron-core writes. Digests are not
            compared.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = check_checkpoint(folder)
        safe_pickle.check_pickles(folder)
        with (folder / ".metadata").open("rb") as stream:
            metadata = safe_pickle.load(stream)
        tensors = {
            name: found
            for name, found in metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata) and not name.startswith(_STATE)
        }
        self.headers = {
            name: Header(tuple(found.size), _NAMES.get(found.properties.dtype, str(found.properties.dtype)))
            for name, found in tensors.items()
        }
        self.parts = list(self._parts(tensors, metadata.storage_data))
        self._parts_of: dict[str, list[Part]] = {}
        for part in self.parts:
            self._parts_of.setdefault(part.name, []).append(part)

    def _parts(self, tensors: dict[str, Any], places: dict[Any, Any]) -> Iterator[Part]:
        shapes = {
            (name, tuple(chunk.offsets)): tuple(chunk.sizes)
            for name, found in tensors.items()
            for chunk in found.chunks
        }
        for index, place in sorted(places.items(), key=lambda item: (item[1].relative_path, item[1].offset)):
            if index.fqn not in tensors:
                continue
            if Path(place.relative_path).name != place.relative_path:
                raise ArtifactError(f"{self.folder / '.metadata'}: names {place.relative_path!r}, no file beside it")
            offset = tuple(index.offset)
            yield Part(index.fqn, offset, shapes[index.fqn, offset], place.relative_path, place.offset, place.length)

    def parts_of(self, name: str) -> list[Part]:
        """Where a tensor lies."""
        return self._parts_of.get(name, [])

    def read(self, name: str) -> Tensor:
        """A whole tensor, in its stored type.

        Raises:
            ArtifactError: Its parts do not cover it, or a part is not a tensor of its shape.
        """
        header, parts = self.headers[name], self.parts_of(name)
        whole = torch.empty(header.shape, dtype=DTYPES[header.dtype])
        filled = 0
        for part in parts:
            values = self.read_part(part)
            whole[part.where] = values
            filled += values.numel()
        if filled != whole.numel():
            raise ArtifactError(f"{self.folder}: {filled} of the {whole.numel()} values of {name} are stored")
        return whole

    def read_part(self, part: Part) -> Tensor:
        """A block as it is stored.

        Raises:
            ArtifactError: It is not a tensor of its shape.
        """
        with (self.folder / part.file).open("rb") as stream:
            view: Any = _create_file_view(stream, part.begin, part.length)
            values = torch.load(view, map_location="cpu", weights_only=True)
        if not isinstance(values, Tensor) or tuple(values.shape) != part.shape:
            raise ArtifactError(f"{self.folder / part.file}: byte {part.begin} is not {part.name} at {part.offset}")
        return values
