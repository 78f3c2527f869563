"""The tensors of an HF checkpoint folder, read in slices straight from its safetensors files.

Nothing is unpickled: `.bin` checkpoints are refused.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_tspin.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from megatron_tspin.checkpoint.tensor_check import Header, refused_dtype, tensor_problems
from megatron_tspin.checkpoint.weight_files import weight_files
from megatron_tspin.errors import ArtifactError, InputError
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families.registry import FAMILIES

_SHOWN = 20
_ROWS = 1024  # compared at once


class HFFolder:
    """Names, shapes, dtypes and slices of the tensors.

    Attributes:
        folder: The folder.
        headers: Shape and stored type of all tensors by name, in the order of the files.

    `model.safetensors` goes before the files of `model.safetensors.index.json`, as in transformers; without either, all
    `*.safetensors` count.

    Raises:
        InputError: No safetensors files, or an index that names a file outside the folder.
        ArtifactError: A file is missing or torn, or two hold a tensor of the same name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, SafetensorsFile] = {}
        self.headers: dict[str, Header] = {}
        for path in weight_files(folder):
            opened = SafetensorsFile(path)
            for name in opened.headers:
                if name in self._file_of:
                    raise ArtifactError(f"{path}: tensor {name} is in {self._file_of[name].path.name} as well")
                self._file_of[name] = opened
                self.headers[name] = opened.headers[name]

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self.headers[name].shape

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._file_of[name].path

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, from the header.

        Raises:
            InputError: It is not a plain floating-point type.
        """
        stored = self.headers[name].dtype
        if stored not in DTYPES:
            raise InputError(f"{self.folder}: {refused_dtype(name, stored)}")
        return DTYPES[stored]

    def read(self, name: str, part: slice | None = None, dim: int = 0) -> Tensor:
        """Reads a tensor, or a part of its rows (`dim` 0) or columns (`dim` 1), and no more than that.

        Raises:
            InputError: It is not of a floating-point type, or holds NaN or an infinity.
        """
        shape = list(self.shape(name))
        if part is not None:
            part = slice(*part.indices(shape[dim])[:2])
            shape[dim] = part.stop - part.start
        values = torch.empty(shape, dtype=self.dtype(name))
        self.read_into(values, name, part, dim)
        return values

    def read_into(
        self,
        target: Tensor,
        name: str,
        part: slice | None = None,
        dim: int = 0,
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Reads straight into a tensor; see `SafetensorsFile.read_into`."""
        self._file_of[name].read_into(target, name, part, dim, progress)

    def check(self, architecture: Architecture) -> None:
        """Demands exactly the tensors that the architecture has, with their shapes.

        Buffers are not weights and are passed over. A tied checkpoint may store its embedding a second time as the
        head.

        Raises:
            InputError: Names every tensor (at most twenty) that is missing, left over, or of another shape or type.
        """
        problems = list(self._problems(architecture))
        if problems:
            more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            raise InputError("\n".join(f"{self.folder}: {line}" for line in problems[:_SHOWN] + more))

    def _problems(self, architecture: Architecture) -> Iterator[str]:
        yield from tensor_problems(self.headers, architecture)
        head, embedding = FAMILIES[architecture.family].head, FAMILIES[architecture.family].embedding
        if architecture.tied_embeddings and {head, embedding} <= self.names:
            if not self._equal(head, embedding):
                yield (
                    f"config.json ties the embeddings but {head} differs from {embedding}; set "
                    "tie_word_embeddings to false, or remove the tensor that is not meant"
                )

    def _equal(self, one: str, two: str) -> bool:
        """Whether two tensors are the same; some rows at a time."""
        count = self.shape(one)[0]
        return self.shape(one) == self.shape(two) and all(
            torch.equal(self.read(one, slice(row, row + _ROWS)), self.read(two, slice(row, row + _ROWS)))
            for row in range(0, count, _ROWS)
        )
