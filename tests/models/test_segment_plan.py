"""Which bundles of a packed row attend side by side, and that every token has exactly one place that answers for it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tspin.models import segment_plan
from megatron_tspin.models.packed_attention import BACKENDS
from megatron_tspin.models.row_layout import Bundle, ContextShare, RowLayout
from megatron_tspin.models.scores import Scores
from megatron_tspin.models.segment_plan import SegmentPlan, plan_segments
from tests.row_bundles import layout_of, rows_of_bundles

TINY, LARGE = Bundle(3, (2, 0, 4)), Bundle(400, (300, 200, 250))
ONE = ContextShare()


def ways(plan: SegmentPlan) -> tuple[int, list[int]]:
    """Kernel calls for blocks, and the sequences of each batch."""
    return len(plan.blocks), [len(batch.sequences) for batch in plan.batches]


def attend(name: str, layout: RowLayout, heads: int, key_groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients of query, key and value at the row's tokens; no gradient arrives at padding."""
    generator = torch.Generator().manual_seed(layout.length)
    made = [
        torch.randn(layout.length, each, 16, generator=generator) for each in (heads, key_groups, key_groups, heads)
    ]
    used = sum(bundle.tokens for bundle in layout.bundles)
    made[3][used:] = 0.0
    query, key, value = (each.to(dtype).requires_grad_() for each in made[:3])
    out = BACKENDS[name](query, key, value, layout, Scores(0.3))
    out.backward(made[3].to(dtype))
    assert query.grad is not None and key.grad is not None and value.grad is not None
    return [each.detach()[:used].double() for each in (out, query.grad, key.grad, value.grad)]


def test_small_bundles_share_a_call_and_large_ones_go_block_by_block() -> None:
    layout = layout_of([TINY, LARGE, *([TINY] * 20)], ONE)
    blocks, batches = ways(plan_segments(layout, 4, 2, 32))
    assert blocks == 4, "the prompt with its first response, two more, and a rectangle"
    assert batches == [42], "two responses with tokens each"
    assert ways(plan_segments(layout_of([LARGE], ONE), 9, 3, 64)) == (4, [])


def test_a_large_bundle_of_one_response_is_one_call() -> None:
    blocks, batches = ways(plan_segments(layout_of([Bundle(900, (800,))], ONE), 9, 3, 64))
    assert blocks + len(batches) == 1


def test_a_batch_is_of_similar_lengths() -> None:
    layout = layout_of([Bundle(2, (100, 98)), Bundle(2, (6, 7))], ONE)
    plan = plan_segments(layout, 4, 2, 32)
    assert [[len(each) for each in batch.sequences] for batch in plan.batches] == [[102, 100], [9, 8]]
    assert [batch.length for batch in plan.batches] == [104, 16]


def test_ranks_that_share_a_row_go_block_by_block() -> None:
    layout = layout_of([TINY] * 8, ContextShare(1, 2))
    plan = plan_segments(layout, 4, 2, 32)
    assert plan.blocks == layout.blocks and not plan.batches


@settings(max_examples=40)
@given(bundles=rows_of_bundles, spare=st.integers(0, 2), call=st.sampled_from([0.0, 600.0, 1e9]))
def test_every_token_has_one_place(bundles: Any, spare: int, call: float) -> None:
    layout, key_groups = layout_of(bundles, ONE, spare), 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment_plan, "_CALL", call)
        plan = plan_segments(layout, 4, key_groups, 1)
    answering = torch.zeros(layout.length, dtype=torch.int64)
    for block in plan.blocks:
        answering[block.query_start : block.query_end] += block.causal
    for batch in plan.batches:
        owned = batch.places if batch.owners is None else batch.places[batch.owners.flatten()]
        answering += torch.bincount(owned // key_groups, minlength=layout.length) // key_groups
    used = sum(bundle.tokens for bundle in bundles)
    assert answering.tolist() == [1] * used + [0] * (layout.length - used)
    if plan.batches:
        inside = torch.ones(layout.length, dtype=torch.bool)
        for start, end in plan.outside:
            inside[start:end] = False
        places = torch.cat([batch.places for batch in plan.batches])[plan.source].view(layout.length, key_groups)
        wanted = torch.arange(layout.length * key_groups).view(layout.length, key_groups)
        assert places[inside].equal(wanted[inside])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 0.03)], ids=str)
@pytest.mark.parametrize(("heads", "key_groups"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(
    "row",
    [
        [TINY] * 30,
        [Bundle(1, (1,)), Bundle(1, (0, 1, 0)), Bundle(7, (0,)), Bundle(5, (1, 9, 3))] * 5,
        [TINY, LARGE, TINY, Bundle(2, (60, 70, 5)), LARGE],
    ],
    ids=["many small", "single tokens and empty responses", "small and large"],
)
def test_both_ways_are_the_dense_one(
    row: list[Bundle], heads: int, key_groups: int, dtype: torch.dtype, tolerance: float
) -> None:
    layout = layout_of(row, ONE, spare=5)
    assert plan_segments(layout, heads, key_groups, 16).batches
    expected = attend("dense", layout, heads, key_groups, torch.float32)
    for found, wanted in zip(attend("segments", layout, heads, key_groups, dtype), expected, strict=True):
        assert (found - wanted).abs().max() < tolerance * max(1.0, wanted.abs().max().item())


def test_rows_attend_the_same_from_run_to_run() -> None:
    layout = layout_of([TINY, LARGE, *([TINY] * 5)], ONE)
    once, again = (attend("segments", layout, 4, 2, torch.float32) for _ in range(2))
    assert all(one.equal(other) for one, other in zip(once, again, strict=True))
