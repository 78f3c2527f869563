"""Writes an HF checkpoint folder: shards of safetensors, their index, and the files that go with them."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from megatron_tspin.checkpoint.safetensors_stream import SafetensorsStream, Sizes, num_bytes
from megatron_tspin.checkpoint.weight_files import INDEX, WEIGHTS
from megatron_tspin.storage import read_json, write_json

SHARD_BYTES = 4 * 2**30
_CONFIG = "config.json"
_COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja"}  # config, tokenizer, chat template, generation settings


class HFWriter:
    """Takes tensors or rows of them, and writes each to its shard at once.

    Args:
        folder: Is created.
        sizes: Shape and dtype of every tensor that will come, in the order in which shards are filled.
        shard_bytes: Most bytes of a shard; a single larger tensor gets a shard of its own.
    """

    def __init__(self, folder: Path, sizes: Sizes, shard_bytes: int) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._sizes = sizes
        self._shards = _plan(sizes, shard_bytes)
        self._file_of = {name: file for file, names in self._shards.items() for name in names}
        self._open: dict[str, SafetensorsStream] = {}

    def add(self, name: str, values: Tensor, row: int = 0) -> None:
        """Takes a tensor, or rows of it from number `row` on; they are cast to the announced dtype.

        Raises:
            InputError: That dtype cannot hold one of the values.
        """
        file = self._file_of[name]
        if file not in self._open:
            inside = {each: self._sizes[each] for each in self._shards[file]}
            self._open[file] = SafetensorsStream(self._folder / file, inside)
        if self._open[file].add(name, values, row):
            del self._open[file]

    def finish(self, source: Path, dtype: torch.dtype | None, link: bool = False) -> None:
        """Writes the index if there are several shards, and copies the files beside the weights of `source`.

        Args:
            source: An HF folder.
            dtype: Written into config.json; None leaves its bytes alone.
            link: Link files that do not change instead, for a folder that does not outlive `source`.
        """
        assert not self._open, f"{sorted(self._open)} lack tensors that were announced"
        if len(self._shards) > 1:
            total = sum(num_bytes(*size) for size in self._sizes.values())
            write_json(self._folder / INDEX, {"metadata": {"total_size": total}, "weight_map": self._file_of})
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix in _COPIED_SUFFIXES and not path.name.endswith(".index.json"):
                if link and (dtype is None or path.name != _CONFIG):
                    (self._folder / path.name).symlink_to(path.resolve())
                else:
                    shutil.copyfile(path, self._folder / path.name)
        if dtype is not None:
            _set_dtype(self._folder / _CONFIG, str(dtype).removeprefix("torch."))


def _plan(sizes: Sizes, shard_bytes: int) -> dict[str, list[str]]:
    """Names of the tensors in each file, the order kept."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        count = num_bytes(*size)
        if shards[-1] and filled + count > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += count
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, start=1)}


def _set_dtype(path: Path, name: str) -> None:
    """Changes `dtype` (transformers 5) or `torch_dtype` (before) in config.json, whichever is there."""
    config = read_json(path)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    path.write_text(json.dumps({**config, key: name}, indent=2) + "\n", encoding="utf-8")
