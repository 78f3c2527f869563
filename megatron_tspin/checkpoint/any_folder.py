"""Checkpoints of both kinds behind one face: tensors by name, one at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from megatron_tspin.checkpoint.core_folder import CoreFolder
from megatron_tspin.checkpoint.core_names import saved_name
from megatron_tspin.checkpoint.hf_folder import HFFolder
from megatron_tspin.checkpoint.manifest import NAME as MANIFEST
from megatron_tspin.checkpoint.tensor_check import Header
from megatron_tspin.errors import InputError
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families.registry import tensors
from megatron_tspin.models.families.table import Tensor as Entry


class Weights(Protocol):
    """What both kinds of folders offer."""

    @property
    def folder(self) -> Path:
        """Where they lie."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Shape and type of each tensor by name."""

    def read(self, name: str) -> Tensor:
        """A whole tensor in its stored type, on the CPU."""


def is_core(folder: Path) -> bool:
    """Whether a folder is a distributed checkpoint of this project.

    Raises:
        InputError: It is no checkpoint of either kind.
    """
    if (folder / MANIFEST).is_file():
        return True
    if (folder / "config.json").is_file():
        return False
    what = "holds neither manifest.json nor config.json" if folder.is_dir() else "no such folder"
    inside = sorted(path.name for path in folder.glob("*/") if (path / MANIFEST).is_file())
    hint = f"; did you mean {folder / inside[-1]}?" if inside else ""
    raise InputError(f"{folder}: {what}; a checkpoint is a distributed one of this project or an HF folder{hint}")


def open_weights(folder: Path) -> CoreFolder | HFFolder:
    """Opens a checkpoint of either kind.

    Raises:
        InputError: It is none, or cannot be used.
    """
    return CoreFolder(folder) if is_core(folder) else HFFolder(folder)


class AsHF:
    """A distributed checkpoint under the names and shapes of HF, read tensor by tensor.

    Args:
        core: The checkpoint.
        architecture: Of the network, from an HF folder's config.json.

    Raises:
        InputError: It is of another architecture.
    """

    def __init__(self, core: CoreFolder, architecture: Architecture) -> None:
        check_summary(core, architecture)
        self.folder = core.folder
        self._core = core
        self._entries: dict[str, tuple[Entry, int]] = {}
        headers = {}
        for entry in tensors(architecture):
            stored = core.headers[saved_name(entry.core, core.headers)]
            for source, (name, shape) in enumerate(zip(entry.hf, entry.layout.shapes, strict=True)):
                self._entries[name] = (entry, source)
                headers[name] = Header(shape, stored.dtype)
        self.headers: Mapping[str, Header] = headers
        self._last: tuple[str, Tensor] | None = None

    def read(self, name: str) -> Tensor:
        """A whole HF tensor."""
        entry, source = self._entries[name]
        if self._last is None or self._last[0] != entry.core:  # queries, keys and values lie in one
            self._last = None
            self._last = (entry.core, self._core.read(saved_name(entry.core, self._core.headers)))
        stored = self._last[1]
        whole = stored.new_empty(entry.layout.shapes[source])
        for begin, part in entry.ranges(0, 1):
            if part.source == source:
                length = part.stop - part.start
                whole.narrow(entry.dim, part.start, length).copy_(stored.narrow(entry.dim, begin, length))
        return whole


def check_summary(core: CoreFolder, architecture: Architecture) -> None:
    """Demands that a distributed checkpoint is of an architecture, as far as its manifest says.

    Raises:
        InputError: Names every fact that differs, or the tensors that are not there; or it has experts.
    """
    if architecture.experts is not None:
        raise InputError(
            f"{core.folder}: of a mixture of experts ({architecture.folder}), whose tensors in a distributed "
            "checkpoint are not taken apart here; export it (`tspin export`) and give the HF folder"
        )
    saved = core.manifest["facts"]["architecture"]
    different = {name: (value, getattr(architecture, name, None)) for name, value in saved.items()}
    lines = [f"{name} is {one} there and {two} here" for name, (one, two) in different.items() if one != two]
    wanted = {saved_name(entry.core, core.headers) for entry in tensors(architecture)}
    lines += [f"{name} is missing there" for name in sorted(wanted - set(core.headers))]
    lines += [f"{name} is not of this network" for name in sorted(set(core.headers) - wanted)]
    if lines:
        raise InputError(
            f"{core.folder}: a checkpoint of another architecture than {architecture.folder}: {'; '.join(lines[:10])}"
        )
