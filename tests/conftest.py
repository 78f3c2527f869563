"""Fixtures of all tests: ranks to run on, and tiny HF checkpoints."""

import multiprocessing
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.rank_pool import RankPool
from tests.tiny_checkpoint import write_checkpoint

# Cores are shared with ranks and whatever else runs: a slow example is no failure.
settings.register_profile("shared_cores", deadline=None)
settings.load_profile("shared_cores")


PROCESSES = "processes"
_FIXTURES_WITH_PROCESSES = {"ranks", "runs"}
_LONGEST = "end_to_end"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of hardware or software that is not here are skipped and say why; those that use ranks are marked.

    The longest files come first, so that none of them is left for the end of one worker.
    """
    missing = {}
    if not torch.cuda.is_available():
        missing |= dict.fromkeys(("gpu", "te"), "needs a CUDA device")
    elif find_spec("transformer_engine") is None:
        missing["te"] = "Transformer Engine is not installed"
    for item in items:
        if _FIXTURES_WITH_PROCESSES & set(getattr(item, "fixturenames", ())):
            item.add_marker(PROCESSES)
        for mark, reason in missing.items():
            if item.get_closest_marker(mark) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: _LONGEST not in item.path.parts)


@pytest.fixture(autouse=True)
def only_marked_tests_start_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make test-fast` leaves marked tests out, and so has to be able to rely on the mark."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError(f"this test starts a process: mark it with pytest.mark.{PROCESSES}")

    if request.node.get_closest_marker(PROCESSES) is None:
        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
        monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankPool]]:
    """`ranks(world_size)` is a `RankPool` that all tests share."""
    pools: dict[int, RankPool] = {}

    def get(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size, tmp_path_factory.mktemp("ranks"))
        return pools[world_size]

    yield get
    for pool in pools.values():
        pool.stop()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_checkpoint(kind)` is the folder of an HF checkpoint; see `tiny_checkpoint.KINDS`. Do not write into it."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(kind: str) -> Path:
        folder = root / kind
        if not folder.is_dir():
            write_checkpoint(folder, kind)
        return folder

    return get
