"""How fast a rank loads HF weights, beside plain reading of as many bytes, and how much memory it takes for that.

Each side lives in a process of its own (`child.py`) and does what it is told when it is told. All of them read from the
page cache, which is filled before each measurement; or all of them from the disk, after the files were dropped from it.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_tspin.models.policy import PolicyModel
    from megatron_tspin.parallel import Topology

_MIB = 2**20
_PAGE = 4096
_PLAIN_BYTES = 2**20
"""That plain reading asks for at once; more was not faster."""


@dataclass(frozen=True)
class Loading:
    """One measurement of one process.

    Attributes:
        seconds: Wall-clock.
        cpu_seconds: Of all threads, in the kernel too: what others on the machine cannot stretch.
        read: Bytes of the files that were asked for, or written.
        kept: Bytes of the weights that are in memory afterwards.
        extra_mib: Peak of the resident set above what the process held before and `kept`.
    """

    seconds: float
    cpu_seconds: float
    read: int
    kept: int
    extra_mib: float


def weights_of(folder: Path) -> list[Path]:
    """The files that are read."""
    from megatron_tspin.checkpoint.weight_files import weight_files

    return weight_files(folder)


def fill_cache(folder: Path) -> None:
    """Reads all files, so that they are in the page cache."""
    buffer = bytearray(_PLAIN_BYTES)
    for path in weights_of(folder):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def drop_cache(folder: Path) -> None:
    """Asks the kernel to forget the files; what is not yet on the disk is written first."""
    for path in weights_of(folder):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(folder: Path, rank: int, size: int, room: "Tensor | None") -> Loading:
    """Reads one of `size` equal parts of the files' bytes, front to back.

    Args:
        folder: The HF folder.
        rank: Which part.
        size: How many there are.
        room: Where to, of `room_for`; None keeps nothing and reads into one small buffer.
    """
    paths = weights_of(folder)
    total = sum(path.stat().st_size for path in paths)
    first, last = total * rank // size, total * (rank + 1) // size
    view = memoryview(bytearray(_PLAIN_BYTES)) if room is None else room.numpy().data
    started, busy = time.perf_counter(), time.process_time()
    begin = 0
    for path in paths:
        low, high = max(first - begin, 0), min(last - begin, path.stat().st_size)
        with path.open("rb", buffering=0) as stream:
            for offset in range(low, high, _PLAIN_BYTES):
                count = min(_PLAIN_BYTES, high - offset)
                place = 0 if room is None else begin + offset - first
                done = os.preadv(stream.fileno(), [view[place : place + count]], offset)
                assert done == count, f"{path}: {done} of {count} bytes at {offset}"
        begin += path.stat().st_size
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - busy
    return Loading(seconds, cpu_seconds, last - first, 0 if room is None else last - first, 0.0)


def write_plainly(target: Path, size: int) -> Loading:
    """Writes so many bytes to a new file, and waits until they are on the disk."""
    piece = os.urandom(_PLAIN_BYTES)

    def write() -> None:
        with target.open("wb", buffering=0) as stream:
            for begin in range(0, size, _PLAIN_BYTES):
                stream.write(piece[: size - begin])
            os.fsync(stream.fileno())

    return replace(_measured(write, size, 0), extra_mib=0.0)


def room_for(folder: Path, size: int) -> "Tensor":
    """Memory for one of `size` equal parts of the files' bytes, as fresh from the system as that of weights is."""
    import torch

    return torch.empty(sum(path.stat().st_size for path in weights_of(folder)) // size + 1, dtype=torch.uint8)


def build(folder: Path, topology: "Topology", bf16: bool = True) -> "PolicyModel":
    """This rank's part of the policy, its weights still undefined."""
    from megatron_tspin.config import ParallelSection, TrainingSection
    from megatron_tspin.config_precision import PrecisionSection
    from megatron_tspin.models.build import build_policy
    from megatron_tspin.models.hf_config import read_architecture

    parallel = ParallelSection(tensor_model_parallel_size=topology.tp_size)
    return build_policy(read_architecture(folder), parallel, TrainingSection(), PrecisionSection(bf16=bf16), topology)


def load_weights(folder: Path, model: "PolicyModel", topology: "Topology", fresh: bool = True) -> Loading:
    """Measures the loading of a policy's weights.

    Args:
        folder: The HF folder.
        model: This rank's part.
        topology: This rank's place.
        fresh: Its parameters are not in memory yet.
    """
    from megatron_tspin.checkpoint.hf_weights import load_hf

    kept = sum(parameter.nbytes for parameter in model.parameters())
    total = sum(path.stat().st_size for path in weights_of(folder))
    return _measured(lambda: load_hf(model, topology), total // topology.tp_size, kept if fresh else 0)


def load_by_transformers(folder: Path, read_all: bool) -> Loading:
    """The whole model by `from_pretrained`, in the type that the files have.

    Args:
        folder: The HF folder.
        read_all: Read a byte of each page of its parameters too: they are maps of the files, not read so far.
    """
    import torch
    from transformers import AutoModelForCausalLM

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        for parameter in model.parameters() if read_all else ():
            parameter.detach().view(-1).view(torch.uint8)[::_PAGE].sum()
        return model

    read = sum(path.stat().st_size for path in weights_of(folder))
    return _measured(load, read, read if read_all else 0)


def _measured(load: Callable[[], Any], read: int, kept: int) -> Loading:
    """Memory is told against what was held before, and against what is held afterwards, whichever tells more."""
    from megatron_tspin.benchmark.memory import PeakMemory

    memory = PeakMemory()
    started, busy = time.perf_counter(), time.process_time()
    result = load()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - busy
    peak = memory.peak_mib()
    above_end = peak + memory.held_mib - PeakMemory().held_mib
    del result
    return Loading(seconds, cpu_seconds, read, kept, max(peak - kept / _MIB, above_end))


def serve_rank(connection: Connection, folder: Path, rank: int, size: int) -> None:
    """The life of a rank: does what it is told by name, see `perform`."""
    from megatron_tspin.config import ParallelSection
    from megatron_tspin.parallel import distributed

    with distributed(ParallelSection(tensor_model_parallel_size=size)) as topology:
        held: dict[str, Any] = {}
        for action in ("load", "load_again"):  # so that nothing is imported while time is taken
            perform(action, folder, topology, held)
        connection.send((True, None))
        while True:
            action, *arguments = connection.recv()
            connection.send((True, asdict(perform(action, folder, topology, held, *arguments))))


def perform(
    action: str, folder: Path, topology: "Topology", held: dict[str, Any], target: Path | None = None
) -> Loading:
    """One measurement; what ends in `_again` goes where the one before it went, and lets it go."""
    rank, size = topology.rank, topology.world_size
    if action == "read":
        held["room"] = room_for(folder, size)
        return read_plainly(folder, rank, size, held["room"])
    if action == "read_again":
        return read_plainly(folder, rank, size, held.pop("room"))
    if action == "read_nowhere":
        return read_plainly(folder, rank, size, None)
    if action == "write" and target is not None:
        return write_plainly(target, sum(path.stat().st_size for path in weights_of(folder)))
    if action == "load_again":
        return load_weights(folder, held.pop("model"), topology, fresh=False)
    model = build(folder, topology, bf16=action != "load_fp32")
    if action == "load_fp32":
        return load_weights(folder, model, topology)
    loading = load_weights(folder, model, topology)
    if action == "load":
        held["model"] = model
        return loading
    assert action == "export" and target is not None, action
    from megatron_tspin.checkpoint.hf_weights import export_hf

    return _measured(lambda: export_hf(model, topology, folder, target), loading.read * size, 0)


def serve_transformers(connection: Connection, folder: Path) -> None:
    """The life of plain transformers: `transformers`, `transformers_all`."""
    import_module("transformers.models.auto.modeling_auto")  # before time is taken
    connection.send((True, None))
    while True:
        (action,) = connection.recv()
        connection.send((True, asdict(load_by_transformers(folder, read_all=action == "transformers_all"))))
