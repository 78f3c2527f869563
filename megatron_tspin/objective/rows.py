"""Lays responses out as rows of tokens: the padded, unshared layout, one row a response.

A micro-batch also says which positions predict which response token (`ResponseTargets`), so a layout that packs rows
and shares prompts fills the same interface.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tspin.models.head import ResponseTargets

Pair = tuple[Sequence[int], Sequence[int]]
"""Prompt ids and response ids."""

_LENGTH_MULTIPLE = 8


@dataclass(frozen=True)
class Rows:
    """A micro-batch of rows, ready for the policy.

    Attributes:
        tokens: int64 [b, s], padded on the right with zeros, which no real position attends to.
        position_ids: int64 [b, s].
        targets: The response tokens and the positions that predict them.
        num_tokens: Tokens that are not padding.
    """

    tokens: Tensor
    position_ids: Tensor
    targets: ResponseTargets
    num_tokens: int


def row_length(pairs: Sequence[Pair], multiple: int = 1) -> int:
    """Length of rows that hold any of the pairs, whose last token is only ever predicted.

    Args:
        pairs: At least one prompt and response.
        multiple: What the layout needs lengths to be a multiple of (TP under sequence parallelism).
    """
    longest = max(len(prompt) + len(response) - 1 for prompt, response in pairs)
    unit = math.lcm(multiple, _LENGTH_MULTIPLE)
    return max(-(-longest // unit), 1) * unit


def pad_rows(pairs: Sequence[Pair], num_rows: int, length: int) -> Rows:
    """One row a pair, in order, then empty rows up to `num_rows`.

    Args:
        pairs: At most `num_rows` prompts and responses; a prompt has one token or more.
        num_rows: b.
        length: s, at least `row_length(pairs)`.
    """
    tokens = torch.zeros(num_rows, length, dtype=torch.int64)
    positions: list[Tensor] = []
    targets: list[int] = []
    owners: list[Tensor] = []
    for row, (prompt, response) in enumerate(pairs):
        ids = [*prompt, *response][:-1]
        tokens[row, : len(ids)] = torch.tensor(ids)
        predictors = torch.arange(len(prompt) - 1, len(ids))
        positions.append(predictors * num_rows + row)  # hidden states are [s, b, h]
        targets.extend(response)
        owners.append(torch.full((len(response),), row))
    empty = torch.zeros(0, dtype=torch.int64)
    return Rows(
        tokens=tokens,
        position_ids=torch.arange(length).expand(num_rows, length).contiguous(),
        targets=ResponseTargets(
            positions=torch.cat([empty, *positions]),
            token_ids=torch.tensor(targets, dtype=torch.int64),
            response_index=torch.cat([empty, *owners]),
            num_responses=len(pairs),
        ),
        num_tokens=sum(len(prompt) + len(response) for prompt, response in pairs),
    )
