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


_STATEFUL = frozenset({
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "_StorageInfo",
})  # fmt: skip
_OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET,
    pickle.BINPUT, pickle.LONG_BINPUT, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1,
    pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.EMPTY_TUPLE,
    pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS,
    pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.NEWOBJ,
    pickle.REDUCE, pickle.BUILD,
)  # fmt: skip


_PythonUnpickler: Any = pickle._Unpickler  # which typeshed takes for the one in C


# To mypy it is Any, and strict mypy refuses to subclass that.
class _Unpickler(_PythonUnpickler):  # type: ignore[misc]
    """Python's unpickler written in Python: the one in C lets nobody look at single opcodes.

    Only those that metadata consists of are known. BUILD gives state to objects of its dataclasses alone: of a class or
    a function it would set attributes for the whole process.
    """

    dispatch = {code[0]: _PythonUnpickler.dispatch[code[0]] for code in _OPCODES}

    def load_build(self) -> None:
        owner = type(self.stack[-2])
        if owner.__name__ not in _STATEFUL or owner.__module__ not in _ALLOWED:
            raise ArtifactError(f"checkpoint metadata sets attributes of a {owner.__name__}; not loaded")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise ArtifactError(f"checkpoint metadata names {module}.{name}, which does not belong there; not loaded")
        return super().find_class(module, name)


def load(stream: IO[bytes]) -> Any:
    """`pickle.load` for checkpoint metadata.

    Raises:
        ArtifactError: It names anything but the dataclasses of such metadata, does anything but build them, or is torn.
    """
    try:
        return _Unpickler(stream).load()
    except ArtifactError:
        raise
    except Exception as error:  # bytes that are no such pickle fail in every way there is
        raise ArtifactError(
            f"checkpoint metadata is not what megatron-core writes: {type(error).__name__}: {error}"
        ) from error


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
