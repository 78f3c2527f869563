"""Packed rows: who lies where, who sees whom, and which part of a row a rank holds."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tspin.models.packed_attention import visible
from megatron_tspin.models.row_layout import AttentionBlock, Bundle, ContextShare, RowLayout
from tests.row_bundles import context_shares, layout_of, rows_of_bundles, sees, tokens_of

CPU = torch.device("cpu")
SHARES = context_shares()


def seen_by_blocks(layout: RowLayout) -> torch.Tensor:
    """How often each query [held tokens] is shown each key [row]."""
    count = torch.zeros(len(layout.held), layout.length, dtype=torch.int64)
    for block in layout.blocks:
        queries, keys = slice(block.query_start, block.query_end), slice(block.key_start, block.key_end)
        shown = torch.ones_like(count[queries, keys])
        count[queries, keys] += shown.tril() if block.causal else shown
    return count


@given(bundles=rows_of_bundles, spare=st.integers(0, 2), window=st.none() | st.integers(1, 12))
def test_a_token_sees_its_prompt_and_its_own_response(bundles: Any, spare: int, window: int | None) -> None:
    layout = layout_of(bundles, ContextShare(), spare)
    row = tokens_of(layout)
    expected = [[sees(row, query, key, window) for key in range(layout.length)] for query in range(layout.length)]
    assert visible(layout, window, CPU).tolist() == expected


@given(bundles=rows_of_bundles, spare=st.integers(0, 2))
def test_facts_of_tokens(bundles: Any, spare: int) -> None:
    layout = layout_of(bundles, ContextShare(), spare)
    row = tokens_of(layout)
    expected = [[token.bundle for token in row], [token.segment for token in row], [token.position for token in row]]
    assert layout.token_facts(CPU).tolist() == expected
    assert layout.longest_sequence == max((token.position + 1 for token in row if token.bundle >= 0), default=0)


@given(bundles=rows_of_bundles, spare=st.integers(0, 2), share=st.sampled_from(SHARES))
def test_blocks_are_what_is_visible(bundles: Any, spare: int, share: ContextShare) -> None:
    """Each visible pair lies in exactly one block, and no other pair in any."""
    layout = layout_of(bundles, share, spare)
    real = layout.token_facts(CPU)[0] >= 0
    expected = visible(layout, None, CPU) & real[None, :]  # padding has no block: nobody reads its output
    assert seen_by_blocks(layout).equal(expected.long())


@given(bundles=rows_of_bundles, spare=st.integers(0, 2), share=st.sampled_from(SHARES))
def test_causal_blocks_come_first_and_once_for_each_query(bundles: Any, spare: int, share: ContextShare) -> None:
    layout = layout_of(bundles, share, spare)
    kinds = [block.causal for block in layout.blocks]
    assert kinds == sorted(kinds, reverse=True)
    queries = [q for block in layout.blocks if block.causal for q in range(block.query_start, block.query_end)]
    real = (layout.token_facts(CPU)[0] >= 0)[layout.held]
    assert sorted(queries) == real.nonzero()[:, 0].tolist()
    for block in layout.blocks:
        assert block.query_start < block.query_end and block.key_start < block.key_end, "a block without pairs"
        assert not block.causal or block.query_end - block.query_start == block.key_end - block.key_start


@given(bundles=rows_of_bundles, spare=st.integers(0, 2), size=st.sampled_from([1, 2, 4]))
def test_ranks_share_a_row_and_gathering_restores_it(bundles: Any, spare: int, size: int) -> None:
    layouts = [layout_of(bundles, ContextShare(rank, size), spare) for rank in range(size)]
    held = [layout.held for layout in layouts]
    assert sorted(torch.cat(held).tolist()) == list(range(layouts[0].length))
    assert len({len(each) for each in held}) == 1
    if size > 1:
        for layout in layouts:
            assert torch.cat(held)[layout.gathered_order].tolist() == list(range(layout.length))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_of_a_long_sequence_attend_to_about_as_much(size: int) -> None:
    """Causal work grows with the position; a plain cut would give the last rank most of it."""
    bundle = Bundle(64, (0,))
    pairs = [
        seen_by_blocks(RowLayout(bundles=(bundle,), length=64, context=ContextShare(r, size))) for r in range(size)
    ]
    assert len({int(each.sum()) for each in pairs}) == 1


def test_a_row_by_hand() -> None:
    """Tokens p p a b b, then q: two bundles, the second of a prompt alone, and two of padding."""
    layout = RowLayout(bundles=(Bundle(2, (1, 2, 0)), Bundle(1, (0,))), length=8)
    assert list(layout.segments()) == [
        (0, 0, 0, 2, 0), (0, 1, 2, 3, 0), (0, 2, 3, 5, 0), (0, 3, 5, 5, 0), (1, 0, 5, 6, 5), (1, 1, 6, 6, 5),
    ]  # fmt: skip
    assert layout.blocks == [
        AttentionBlock(0, 3, 0, 3, True),  # the prompt with its first response
        AttentionBlock(3, 5, 3, 5, True),
        AttentionBlock(5, 6, 5, 6, True),
        AttentionBlock(3, 5, 0, 2, False),
    ]
    assert visible(layout, None, CPU).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]


def test_what_layers_share_is_made_once() -> None:
    layout, made = RowLayout(bundles=(Bundle(1, (1,)),), length=8), []
    for _ in range(2):
        layout.cached("mask", lambda: made.append(1))
        layout.cached("other", lambda: made.append(2))
    assert sorted(made) == [1, 2]


def test_rows_do_not_share_masks() -> None:
    first, second = (RowLayout(bundles=(Bundle(size, (1,)),), length=8) for size in (2, 3))
    assert first.cached("mask", lambda: 1) == 1 and second.cached("mask", lambda: 2) == 2
