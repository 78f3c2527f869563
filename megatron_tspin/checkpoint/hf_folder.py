"""The tensors of an HF checkpoint folder, read in slices straight from its safetensors files.

Nothing is unpickled: `.bin` checkpoints are refused.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_tspin.checkpoint.tensor_check import Header, refused_dtype, tensor_problems
from megatron_tspin.checkpoint.weight_files import weight_files
from megatron_tspin.errors import ArtifactError, InputError
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families.registry import FAMILIES

_SHOWN = 20
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HFFolder:
    """Names, shapes, dtypes and slices of the tensors.

    `model.safetensors` goes before the files of `model.safetensors.index.json`, as in transformers; without either, all
    `*.safetensors` count.

    Raises:
        InputError: No safetensors files, or an index that names a file outside the folder.
        ArtifactError: A file is missing or torn, or two hold a tensor of the same name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, Path] = {}
        for path in weight_files(folder):
            opened = _open(path)
            for name in opened.keys():  # not a mapping: it cannot be iterated
                if name in self._file_of:
                    raise ArtifactError(f"{path}: tensor {name} is in {self._file_of[name].name} as well")
                self._file_of[name] = path
                self._files[name] = opened

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, from the header.

        Raises:
            InputError: It is not a plain floating-point type.
        """
        stored = self._stored_dtype(name)
        if stored not in _DTYPES:
            raise InputError(f"{self.folder}: {refused_dtype(name, stored)}")
        return _DTYPES[stored]

    def _stored_dtype(self, name: str) -> str:
        return str(self._files[name].get_slice(name).get_dtype())

    def read(self, name: str, part: slice | None = None, dim: int = 0) -> Tensor:
        """Reads a tensor, or a part of its rows (`dim` 0) or columns (`dim` 1), and no more than that.

        Raises:
            InputError: It holds NaN or an infinity.
        """
        stored = self._files[name].get_slice(name)
        if part is None:
            tensor: Tensor = stored[:]
        else:
            tensor = stored[part] if dim == 0 else stored[:, part]
        if not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise InputError(
                f"{self._file_of[name]}: tensor {name} holds {bad} values that are NaN or infinite; take a checkpoint "
                "whose training went well"
            )
        return tensor

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
        yield from tensor_problems(
            {name: Header(self.shape(name), self._stored_dtype(name)) for name in self.names}, architecture
        )
        head, embedding = FAMILIES[architecture.family].head, FAMILIES[architecture.family].embedding
        if architecture.tied_embeddings and {head, embedding} <= self.names:
            if not torch.equal(self.read(head), self.read(embedding)):
                yield (
                    f"config.json ties the embeddings but {head} differs from {embedding}; set "
                    "tie_word_embeddings to false, or remove the tensor that is not meant"
                )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: not a whole safetensors file ({error}); download it again") from error
