"""Prompts of a step of generation as one packed row: equal ones once, and what all begin with once.

Chat templates begin every prompt with the same tokens, and several answers to a prompt begin with all of it. The row is
that of training (`row_layout`): a bundle whose prompt is the common beginning and whose responses are the rests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from megatron_tspin.models.row_layout import Bundle, RowLayout

_WORTH = 16
"""A common beginning is computed once where that spares at least one token in so many of the row."""


@dataclass(frozen=True)
class PromptRow:
    """Where the tokens of some prompts lie in a row.

    Attributes:
        shared: Tokens that all prompts begin with, at the front of the row.
        rests: Further tokens of each of the different prompts, at least one.
        rest_of: Of each prompt, the number of its rest.
    """

    shared: int
    rests: tuple[int, ...]
    rest_of: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return self.shared + sum(self.rests)

    @cached_property
    def layout(self) -> RowLayout:
        """The row as attention sees it."""
        apart = tuple(Bundle(rest, ()) for rest in self.rests)
        return RowLayout(bundles=(Bundle(self.shared, self.rests),) if self.shared else apart, length=self.tokens)

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """Of each token of the row in its prompt, int64 [tokens]."""
        parts = [np.arange(self.shared), *(self.shared + np.arange(rest) for rest in self.rests)]
        return np.concatenate(parts).astype(np.int64)

    @cached_property
    def places(self) -> list[NDArray[np.int64]]:
        """Of each prompt, where in the row its tokens are, int64 [its tokens]."""
        ends = self.shared + np.cumsum(self.rests, dtype=np.int64)
        front = np.arange(self.shared)
        return [np.concatenate((front, np.arange(ends[i] - self.rests[i], ends[i]))) for i in self.rest_of]


def prompt_row(prompts: Sequence[Sequence[int]], share: bool = True) -> tuple[NDArray[np.int64], PromptRow]:
    """The token ids of the row, int64 [tokens], and where the prompts are in it.

    Args:
        prompts: Token ids of each, at least one.
        share: Whether attention takes a common beginning that is there once.
    """
    numbers: dict[tuple[int, ...], int] = {}
    rest_of = tuple(numbers.setdefault(tuple(ids), len(numbers)) for ids in prompts)
    different = list(numbers)
    shared = _common(different)
    if not share or shared * (len(different) - 1) * _WORTH < sum(map(len, different)):
        shared = 0
    rests = [ids[shared:] for ids in different]
    row = [token for ids in (*(each[:shared] for each in different[:1]), *rests) for token in ids]
    return np.array(row, dtype=np.int64), PromptRow(shared, tuple(map(len, rests)), rest_of)


def _common(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all begin with, and that leave each at least one."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # whatever these two have in common, those between them have
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    return min(same, min(map(len, prompts)) - 1)
