"""Reads the pickles of a torch_dist checkpoint without letting them run code.

torch.distributed.checkpoint unpickles `.metadata` with Python's own unpickler, which calls whatever the file names.
Within `restricted_metadata` it may only build the dataclasses that such metadata consists of, and `torch.load` reads
everything else with `weights_only=True`: metadata can declare any tensor to be a pickled object, which torch would open
without that.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
import torch.distributed.checkpoint.filesystem as torch_filesystem

from megatron_tspin.errors import ArtifactError

# torch's own switches; both of them on would be refused.
_FORCE = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},  # looks a name up in a fixed table
    "torch": {"Size", "float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise ArtifactError(f"checkpoint metadata names {module}.{name}, which does not belong there; not loaded")
        return super().find_class(module, name)


def load(stream: IO[bytes]) -> Any:
    """`pickle.load` for checkpoint metadata.

    Raises:
        ArtifactError: It names anything but the dataclasses of such metadata.
    """
    return _Unpickler(stream).load()


def check_pickles(folder: Path) -> None:
    """Opens the pickles of a checkpoint once, as carefully as they will be read, for an error that can be understood.

    Raises:
        ArtifactError: One of them holds anything that does not belong there.
    """
    try:
        with (folder / ".metadata").open("rb") as stream:
            load(stream)
        if (folder / "common.pt").exists():  # megatron-core 0.19 keeps its contents among the tensors
            torch.load(folder / "common.pt", map_location="cpu", weights_only=True)
    except ArtifactError as error:
        raise ArtifactError(f"{folder / '.metadata'}: {error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{folder}: .metadata or common.pt is not what megatron-core writes: {reason}") from error


@contextmanager
def restricted_metadata() -> Iterator[None]:
    """Within the block torch.distributed.checkpoint reads metadata through `load` and objects as weights only."""
    module: Any = torch_filesystem
    original = module.pickle
    # The module's own name `pickle` is replaced, not the module it stands for: nobody else sees a difference.
    module.pickle = SimpleNamespace(load=load, dump=pickle.dump)
    forced = {name: os.environ.get(name) for name in _FORCE}
    os.environ.update(_FORCE)
    try:
        yield
    finally:
        module.pickle = original
        for name, value in forced.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
