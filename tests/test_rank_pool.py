"""The pool of ranks itself."""

import os
import time

import pytest

from megatron_tspin.config import ParallelSection
from megatron_tspin.errors import InputError
from tests.rank_pool import RankFailure, in_layout


def _sum_of_ranks(tp: int, pp: int) -> tuple[int, int, float]:
    import torch
    import torch.distributed as dist

    layout = ParallelSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    with in_layout(layout) as topology:
        total = torch.tensor([float(topology.rank)])
        dist.all_reduce(total)
        return topology.tp_rank, topology.pp_rank, total.item()


def _refuse_on(rank: int) -> int:
    if int(os.environ["RANK"]) == rank:
        raise InputError("bad input")
    return os.getpid()


def _hang_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(60)


def _die_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        os._exit(7)


def test_layouts_follow_each_other_in_one_pool(ranks):
    assert ranks(2).run(_sum_of_ranks, 2, 1) == [(0, 0, 1.0), (1, 0, 1.0)]
    assert ranks(2).run(_sum_of_ranks, 1, 2) == [(0, 0, 1.0), (0, 1, 1.0)]


def test_the_exception_of_a_rank_comes_back_with_its_traceback(ranks):
    with pytest.raises(InputError, match="bad input") as caught:
        ranks(2).run(_refuse_on, 1)
    assert "on rank 1" in caught.value.__notes__[0] and "_refuse_on" in caught.value.__notes__[0]


def test_the_ranks_stay(ranks):
    before = ranks(2).run(_refuse_on, -1)
    assert os.getpid() not in before and ranks(2).run(_refuse_on, -1) == before


def test_hanging_and_dying_ranks_are_named_and_replaced(ranks):
    with pytest.raises(RankFailure, match=r"ranks \[1\] gave no answer within 2 s"):
        ranks(2).run(_hang_on_rank_one, timeout=2)
    with pytest.raises(RankFailure, match=r"rank 1 died \(exit code 7\)"):
        ranks(2).run(_die_on_rank_one)
    assert len(ranks(2).run(_refuse_on, -1)) == 2
