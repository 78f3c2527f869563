"""Ranks agree on what the disk holds, and wait for each other as long as makes sense."""

import datetime
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin import parallel
from megatron_tspin.config import ParallelSection
from megatron_tspin.errors import ArtifactError, InputError
from megatron_tspin.lost_rank import explain
from tests.rank_pool import in_layout
from tests.stale_disk import stale_on_rank_1

TWO = ParallelSection(data_parallel_size=2)
STEP_SECONDS = 1.0


def look(folder: Path) -> tuple[bool, bool]:
    with in_layout(TWO) as topology, stale_on_rank_1(folder):
        return folder.is_dir(), parallel.on_first_rank(folder.is_dir, topology)


def test_all_ranks_see_what_rank_0_sees(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2).run(look, tmp_path) == [(True, True), (False, True)]


def refused_by_rank_0() -> str:
    def refuse() -> None:
        raise InputError(f"a.jsonl:3: seen by rank {topology.rank}")

    with in_layout(TWO) as topology:
        with pytest.raises(InputError) as caught:
            parallel.on_first_rank(refuse, topology)
        return str(caught.value)


def test_what_rank_0_refuses_all_refuse(ranks: Any) -> None:
    assert ranks(2).run(refused_by_rank_0) == ["a.jsonl:3: seen by rank 0"] * 2


def read_facts(same: bool) -> str:
    with in_layout(TWO) as topology:
        facts = {"prompt": "d1", "synthetic": "d2" if same or topology.rank == 0 else "old"}
        try:
            parallel.refuse_stale_facts("iteration 3", facts, topology)
        except ArtifactError as error:
            return str(error)
        return ""


def test_a_rank_that_read_something_else_is_named_on_all_ranks(ranks: Any) -> None:
    assert ranks(2).run(read_facts, True) == ["", ""]
    first, second = ranks(2).run(read_facts, False)
    assert first == second
    assert "iteration 3: rank 1 reads another state of the disk: synthetic is old, on rank 0 d2; run the" in first


def meet_late(wait: str) -> str:
    """Rank 1 comes late by more than a step may take; returns what became of the meeting."""
    import torch
    import torch.distributed as dist

    def meet(topology: Any) -> None:
        if wait == "step":
            parallel.sum_over_replicas(torch.zeros(1), topology)
        elif wait == "all":
            parallel.wait_for_all_ranks()

    with in_layout(TWO) as topology:
        parallel.sum_over_replicas(torch.zeros(1), topology)  # connects them, which may take longer than this step may
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=STEP_SECONDS), topology.dp_group)
        parallel.wait_for_all_ranks()
        started = time.monotonic()
        if wait == "rank 0":
            parallel.on_first_rank(lambda: time.sleep(3 * STEP_SECONDS), topology)
            return "met"
        time.sleep(3 * STEP_SECONDS * topology.rank)
        try:
            meet(topology)
        except RuntimeError as error:
            assert time.monotonic() - started < 3 * STEP_SECONDS or topology.rank == 1
            return str(explain(error))
        return "met"


def test_a_step_waits_a_short_time_for_a_rank(ranks: Any) -> None:
    on_time, late = ranks(2).run(meet_late, "step")
    assert on_time.startswith("waited too long for another rank in all_reduce: it hangs, or is far behind (Timed out")
    assert late.startswith("lost another rank in all_reduce: ")


@pytest.mark.parametrize("wait", ["all", "rank 0"])
def test_between_steps_ranks_wait_long(wait: str, ranks: Any) -> None:
    assert ranks(2).run(meet_late, wait) == ["met", "met"]


OTHERS = [ValueError("gloo: timed out"), RuntimeError("timed out"), RuntimeError("NCCL: bad")]


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_left_alone(error: Exception) -> None:
    assert explain(error) is None
