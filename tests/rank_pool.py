"""Ranks that live as long as the test session: spawned once, joined once, handed functions to run.

Importing torch and megatron-core costs each process seconds, so a test does not start its own. The pytest process keeps
out of it: the patches of `prepare_platform` are for the ranks alone, also for a single one.

    def logits(kind, path): ...            # module level; builds its topology with `in_layout`
    results = ranks(2).run(logits, "tied", path)   # [result of rank 0, result of rank 1]
"""

import multiprocessing
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_tspin.config import ParallelSection
    from megatron_tspin.parallel import Topology

TIMEOUT_SECONDS = 120.0
THREADS = "TSPIN_TEST_THREADS"
"""Names the variable with the number of threads of each rank; without it that is one."""
_GRACE_SECONDS = 5.0  # for the other ranks, once one has failed: they may hang in a collective


class RankFailure(Exception):
    """A rank died, hung, or raised what cannot be sent back."""


class RankPool:
    """`world_size` processes in one group. A failure that may leave a rank inside a collective kills the pool."""

    def __init__(self, world_size: int, folder: Path) -> None:
        self.world_size = world_size
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._folder = folder
        self._generation = 0

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_SECONDS) -> list[Any]:
        """Calls `function(*args)` on every rank.

        Args:
            function: Of a module's top level, so that the ranks can import it.
            args: Sent by pickle to every rank.
            timeout: Seconds until the pool is killed and the test fails.

        Returns:
            What each rank returned, in the order of the ranks.

        Raises:
            Exception: What the lowest failing rank raised, with its traceback as a note.
            RankFailure: A rank died or did not answer in time.
        """
        import pytest
        import torch

        if torch.cuda.is_available() and self.world_size > torch.cuda.device_count():
            pytest.skip(f"{self.world_size} ranks need the same number of GPUs")
        # The ranks need the search path before they can unpickle the rest.
        job = pickle.dumps((list(sys.path), pickle.dumps((function, args))))
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send_bytes(job)
        answers = self._collect(time.monotonic() + timeout, timeout)
        failed = [rank for rank in sorted(answers) if not answers[rank][0]]
        if len(answers) < self.world_size:
            self.stop()
        if failed:
            raise answers[failed[0]][1]
        return [answers[rank][1] for rank in range(self.world_size)]

    def _collect(self, deadline: float, timeout: float) -> dict[int, tuple[bool, Any]]:
        """(ok, result or exception) by rank; ranks that hang because another one failed are missing."""
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < self.world_size:
            waiting = {self._connections[rank]: rank for rank in range(self.world_size) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready and any(not ok for ok, _ in answers.values()):
                return answers
            if not ready:
                self.stop()
                raise RankFailure(f"ranks {sorted(waiting.values())} gave no answer within {timeout:.0f} s")
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    answers[rank] = (False, RankFailure(f"rank {rank} died (exit code {self._exit_code(rank)})"))
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if any(isinstance(value, RankFailure) for _, value in answers.values()):
            self.stop()
        return answers

    def _exit_code(self, rank: int) -> Any:
        self._processes[rank].join(timeout=5)
        return self._processes[rank].exitcode

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._generation += 1
        store = self._folder / f"store_{self.world_size}_{self._generation}"
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            # Not daemons: megatron-core's checkpoint writer forks, which daemons may not.
            process = context.Process(target=_serve, args=(theirs, rank, self.world_size, str(store)))
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def stop(self) -> None:
        """Ends the processes; the next `run` starts new ones."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._connections, self._processes = [], []


def _serve(connection: Connection, rank: int, world_size: int, store: str) -> None:
    """The life of a rank: join, then run what comes until the pipe closes."""
    threads = os.environ.get(THREADS, "1")
    os.environ.update(OMP_NUM_THREADS=threads, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    _end_with_parent()
    group_is_up = False
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        try:
            if not group_is_up:
                _join(rank, world_size, store)
                group_is_up = True
            sys.path[:], call = pickle.loads(job)
            function, args = pickle.loads(call)
            answer = pickle.dumps((True, function(*args)))
        except BaseException as error:  # torch's CheckpointException is no Exception
            answer = _failure(error, rank)
        connection.send_bytes(answer)


def _failure(error: BaseException, rank: int) -> bytes:
    text = f"on rank {rank}:\n{traceback.format_exc()}"
    error.add_note(text)
    try:
        answer = pickle.dumps((False, error))
        pickle.loads(answer)
    except Exception:
        answer = pickle.dumps((False, RankFailure(f"{type(error).__name__}: {error}\n{text}")))
    return answer


def _end_with_parent() -> None:
    """No orphans: a rank that hangs in a collective ends when pytest does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _join(rank: int, world_size: int, store: str) -> None:
    import datetime

    import torch.distributed as dist

    from megatron_tspin.platform import backend, prepare_platform

    prepare_platform(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group(
        backend(),
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS),
    )


@contextmanager
def in_layout(layout: "ParallelSection") -> "Iterator[Topology]":
    """For functions that run on ranks: megatron-core's groups for one layout, taken down at the end."""
    from megatron.core import parallel_state

    from megatron_tspin.parallel import build_topology

    assert layout.world_size == int(os.environ["WORLD_SIZE"]), "take a pool of the layout's world size"
    try:
        yield build_topology(layout)
    finally:
        parallel_state.destroy_model_parallel()
        _destroy_subgroups()


def _destroy_subgroups() -> None:
    """Each of megatron-core's gloo groups has a thread that never sleeps for long; thousands of them eat the cores."""
    import gc

    import torch.distributed as dist

    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()
