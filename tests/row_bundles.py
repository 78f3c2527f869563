"""Rows of random bundles, and what their layout has to be, worked out token by token."""

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from megatron_tspin.models.row_layout import Bundle, ContextShare, RowLayout


def context_shares() -> list[ContextShare]:
    """Every rank's place under CP 1, 2 and 4; no process group is needed to lay a row out."""
    return [ContextShare(rank, size) for size in (1, 2, 4) for rank in range(size)]


def covering(tokens: int, context: ContextShare, spare: int = 0) -> int:
    """A row length that holds the tokens, `spare` chunks more than needed."""
    multiple = 2 * context.size if context.size > 1 else 1
    return (max(-(-tokens // multiple), 1) + spare) * multiple


def layout_of(bundles: list[Bundle], context: ContextShare, spare: int = 0) -> RowLayout:
    tokens = sum(bundle.tokens for bundle in bundles)
    return RowLayout(bundles=tuple(bundles), length=covering(tokens, context, spare), context=context)


# A response of one token takes no place in the row, so lengths of 0 count.
bundles = st.builds(
    Bundle,
    prompt=st.integers(1, 9),
    responses=st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
)
rows_of_bundles: Any = st.lists(bundles, min_size=0, max_size=4)


@dataclass(frozen=True)
class Token:
    """A token of a row; padding has bundle -1."""

    bundle: int
    segment: int
    position: int


def tokens_of(layout: RowLayout) -> list[Token]:
    """Every token of the row, one after the other."""
    found = []
    for number, bundle in enumerate(layout.bundles):
        found += [Token(number, 0, position) for position in range(bundle.prompt)]
        for segment, size in enumerate(bundle.responses, start=1):
            found += [Token(number, segment, bundle.prompt + position) for position in range(size)]
    return found + [Token(-1, 0, 0)] * (layout.length - len(found))


def sees(row: list[Token], query: int, key: int, window: int | None = None) -> bool:
    """Whether the token at `query` may look at the one at `key`: its own prompt and response, nothing later."""
    q, k = row[query], row[key]
    if query == key:
        return True
    if q.bundle < 0 or q.bundle != k.bundle or key > query or k.segment not in (0, q.segment):
        return False
    return window is None or q.position - k.position < window
