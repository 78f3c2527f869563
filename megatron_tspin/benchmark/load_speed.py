"""How fast a rank loads HF weights, beside plain reading of as many bytes, and how much memory it takes for that.

Each side lives in a process of its own (`child.py`) and does what it is told when it is told. All of them read from the
page cache, which is filled before each measurement; or all of them from the disk, after the files were dropped from it.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
        read: Bytes of the files that were asked for.
        kept: Bytes of the weights that are in memory afterwards.
        extra_mib: Peak of the resident set above what the process held before and `kept`.
    """

    seconds: float
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


def read_plainly(folder: Path, rank: int, size: int, keep: bool) -> Loading:
    """Reads one of `size` equal parts of the files' bytes, front to back.

    Args:
        folder: The HF folder.
        rank: Which part.
        size: How many there are.
        keep: Into memory of its own, fresh from the system as that of weights is; else into one small buffer.
    """
    import torch

    paths = weights_of(folder)
    total = sum(path.stat().st_size for path in paths)
    first, last = total * rank // size, total * (rank + 1) // size
    room = torch.empty(last - first if keep else _PLAIN_BYTES, dtype=torch.uint8)
    view = room.numpy().data
    started = time.perf_counter()
    begin = 0
    for path in paths:
        length = path.stat().st_size
        low, high = max(first - begin, 0), min(last - begin, length)
        with path.open("rb", buffering=0) as stream:
            for offset in range(low, high, _PLAIN_BYTES):
                count = min(_PLAIN_BYTES, high - offset)
                place = begin + offset - first if keep else 0
                done = os.preadv(stream.fileno(), [view[place : place + count]], offset)
                assert done == count, f"{path}: {done} of {count} bytes at {offset}"
        begin += length
    return Loading(time.perf_counter() - started, last - first, last - first if keep else 0, 0.0)


def load_policy_weights(folder: Path, topology: "Topology", bf16: bool = True) -> "tuple[Loading, PolicyModel]":
    """Builds this rank's part of the policy, and measures the loading of its weights alone."""
    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.config import ParallelSection, TrainingSection
    from megatron_tspin.config_precision import PrecisionSection
    from megatron_tspin.models.build import build_policy
    from megatron_tspin.models.hf_config import read_architecture

    parallel = ParallelSection(tensor_model_parallel_size=topology.tp_size)
    model = build_policy(read_architecture(folder), parallel, TrainingSection(), PrecisionSection(bf16=bf16), topology)
    kept = sum(parameter.nbytes for parameter in model.parameters())
    total = sum(path.stat().st_size for path in weights_of(folder))
    return _measured(lambda: load_hf(model, topology), total // topology.tp_size, kept), model


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
    started = time.perf_counter()
    result = load()
    seconds = time.perf_counter() - started
    peak = memory.peak_mib()
    above_end = peak + memory.held_mib - PeakMemory().held_mib
    del result
    return Loading(seconds, read, kept, max(peak - kept / _MIB, above_end))


def serve_rank(connection: Connection, folder: Path, rank: int, size: int) -> None:
    """The life of a rank: `read`, `read_again` (into a buffer), `load`, `load_fp32`, `export TARGET`."""
    from megatron_tspin.config import ParallelSection
    from megatron_tspin.parallel import distributed

    with distributed(ParallelSection(tensor_model_parallel_size=size)) as topology:
        load_policy_weights(folder, topology)  # once, so that nothing is imported while time is taken
        connection.send((True, None))
        while True:
            action, *arguments = connection.recv()
            if action == "read":
                answer = read_plainly(folder, rank, size, keep=True)
            elif action == "read_again":
                answer = read_plainly(folder, rank, size, keep=False)
            elif action == "export":
                answer = _export(folder, arguments[0], topology)
            else:
                answer, _ = load_policy_weights(folder, topology, bf16=action == "load")
            connection.send((True, asdict(answer)))


def _export(folder: Path, target: Path, topology: "Topology") -> Loading:
    from megatron_tspin.checkpoint.hf_weights import export_hf

    loading, model = load_policy_weights(folder, topology)
    return _measured(lambda: export_hf(model, topology, folder, target), loading.read, 0)


def serve_transformers(connection: Connection, folder: Path) -> None:
    """The life of plain transformers: `transformers`, `transformers_all`."""
    from transformers import AutoModelForCausalLM  # noqa: F401 (imported before time is taken)

    connection.send((True, None))
    while True:
        (action,) = connection.recv()
        connection.send((True, asdict(load_by_transformers(folder, read_all=action == "transformers_all"))))
