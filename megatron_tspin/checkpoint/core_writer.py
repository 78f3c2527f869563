"""Writes a distributed checkpoint of weights in one process, as the ranks of a layout would.

A part at a time, without a model and without torch.distributed. The files are those that megatron-core's ranks write:
same names, same parts, same metadata.
"""

import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_tspin.checkpoint.core_folder import CoreFolder
from megatron_tspin.checkpoint.manifest import describe_files, write_manifest
from megatron_tspin.errors import InputError

_COPIED = ("common.pt", "metadata.json")  # say which format it is, and nothing of the weights


class CoreWriter:
    """Takes parts of tensors; a context manager that closes the files.

    Args:
        folder: Is created.
        like: A checkpoint of the same network, which gives the files that say what format this is.

    Raises:
        InputError: `like` has these facts elsewhere, as megatron-core 0.19 keeps them.
    """

    def __init__(self, folder: Path, like: CoreFolder) -> None:
        absent = [name for name in _COPIED if not (like.folder / name).is_file()]
        if absent:
            raise InputError(
                f"{like.folder}: has no {', '.join(absent)}: saved by megatron-core "
                f"{like.manifest['facts']['megatron_core']}, whose checkpoints are read here but not written; it loads "
                "under any layout as it is"
            )
        folder.mkdir(parents=True)
        self._folder = folder
        self._like = like
        self._streams: dict[str, IO[bytes]] = {}
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams.values():
            stream.close()

    def add(self, file: str, name: str, shape: tuple[int, ...], offset: tuple[int, ...], values: Tensor) -> None:
        """Writes a part behind what the file holds already.

        Args:
            file: Name of the file: `__R_0.distcp` for rank R.
            name: Of the tensor.
            shape: Of the whole tensor.
            offset: Of the part in it.
            values: The part, on the CPU.
        """
        values = values.detach().clone(memory_format=torch.contiguous_format)  # or torch would save what it is cut from
        if file not in self._streams:
            self._streams[file] = (self._folder / file).open("wb")
        stream = self._streams[file]
        begin = stream.tell()
        torch.save(values, stream)
        whole = self._tensors.setdefault(
            name, TensorStorageMetadata(TensorProperties.create_from_tensor(values), torch.Size(shape), [])
        )
        place = MetadataIndex(name, torch.Size(offset), len(whole.chunks))
        whole.chunks.append(ChunkStorageMetadata(torch.Size(offset), values.shape))
        self._places[place] = _StorageInfo(file, begin, stream.tell() - begin)

    def finish(self, facts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Writes the metadata and the manifest, after which the folder is a checkpoint.

        Args:
            facts: What is so of this checkpoint alone; without an optimizer.
            state: Small and JSON-able.
        """
        for stream in self._streams.values():
            stream.close()
        metadata = Metadata(dict(self._tensors), storage_data=self._places, storage_meta=StorageMeta())
        metadata.version = CURRENT_DCP_VERSION
        with (self._folder / ".metadata").open("wb") as stream:
            pickle.dump(metadata, stream)
        for name in _COPIED:
            shutil.copyfile(self._like.folder / name, self._folder / name)
        names = sorted(os.listdir(self._folder))
        weights_only = {"optimizer": None, "delayed_scaling": None, "torch": torch.__version__}
        write_manifest(
            self._folder,
            describe_files(self._folder, names),
            {**self._like.manifest["facts"], **weights_only, **facts},
            dict(state),
        )
