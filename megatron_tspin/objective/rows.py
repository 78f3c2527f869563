"""Lays responses out as rows of tokens.

Packed: several prompts with their responses in one row. Padded: a row a response, the readable reference. Both also say
which positions predict which response token (`ResponseTargets`); the loss does not know the difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tspin.models.head import ResponseTargets
from megatron_tspin.models.row_layout import WHOLE_ROW, Bundle, ContextShare, RowLayout

Pair = tuple[Sequence[int], Sequence[int]]
"""Prompt ids and response ids."""

_LENGTH_MULTIPLE = 8


@dataclass(frozen=True)
class Rows:
    """A micro-batch of rows, ready for the policy.

    Attributes:
        tokens: int64 [b, s], padded on the right with zeros, which no real position attends to. Of a packed row (b is
            1) those that this CP rank holds.
        position_ids: int64 [b, s].
        targets: The response tokens and the positions that predict them, on this CP rank.
        num_tokens: Prompt and response tokens, a prompt counted once a response whatever the layout.
        places: Tokens that the rows have room for, over all CP ranks.
        used: Places that are not padding.
        prompt_tokens: Prompt tokens, a prompt counted once a response.
        prompt_places: Places that prompts take.
        layout: Of a packed row.
    """

    tokens: Tensor
    position_ids: Tensor
    targets: ResponseTargets
    num_tokens: int
    places: int
    used: int
    prompt_tokens: int
    prompt_places: int
    layout: RowLayout | None = None

    @property
    def row_length(self) -> int:
        """s, over all CP ranks."""
        return self.tokens.shape[1] if self.layout is None else self.layout.length


def row_length(pairs: Sequence[Pair], multiple: int = 1) -> int:
    """Length of rows that hold any of the pairs, whose last token is only ever predicted.

    Args:
        pairs: At least one prompt and response.
        multiple: What the layout needs lengths to be a multiple of (TP under sequence parallelism).
    """
    longest = max(len(prompt) + len(response) - 1 for prompt, response in pairs)
    unit = math.lcm(multiple, _LENGTH_MULTIPLE)
    return max(-(-longest // unit), 1) * unit


def pad_rows(pairs: Sequence[Pair], num_rows: int, length: int, diagnostics: bool = False) -> Rows:
    """One row a pair, in order, then empty rows up to `num_rows`.

    Args:
        pairs: At most `num_rows` prompts and responses; a prompt has one token or more.
        num_rows: b.
        length: s, at least `row_length(pairs)`.
        diagnostics: See `ResponseTargets`.
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
            diagnostics=diagnostics,
        ),
        num_tokens=sum(len(prompt) + len(response) for prompt, response in pairs),
        places=num_rows * length,
        used=sum(len(prompt) + len(response) - 1 for prompt, response in pairs),
        prompt_tokens=sum(len(prompt) for prompt, _ in pairs),
        prompt_places=sum(len(prompt) for prompt, _ in pairs),
    )


BundleIds = tuple[Sequence[int], Sequence[Sequence[int]]]
"""Prompt ids and the ids of the responses that share it."""


def pack_row(
    bundles: Sequence[BundleIds], length: int, context: ContextShare = WHOLE_ROW, diagnostics: bool = False
) -> Rows:
    """One row of all bundles: each prompt once, then its responses without their last tokens, which are only predicted.

    Args:
        bundles: Prompts of one token or more with responses of one or more.
        length: Tokens of the row, at least those of the bundles; a multiple of 2 x CP under context parallelism.
        context: Which part of the row this rank holds.
        diagnostics: See `ResponseTargets`.
    """
    layout = RowLayout(
        bundles=tuple(Bundle(len(prompt), tuple(len(ids) - 1 for ids in responses)) for prompt, responses in bundles),
        length=length,
        context=context,
    )
    tokens: list[int] = []
    position_ids: list[int] = []
    targets: list[tuple[int, int, int]] = []  # row index, token that it predicts, response
    num_responses = 0
    for prompt, responses in bundles:
        last_of_prompt = len(tokens) + len(prompt) - 1
        tokens.extend(prompt)
        position_ids.extend(range(len(prompt)))
        for response in responses:
            predictors = (last_of_prompt, *range(len(tokens), len(tokens) + len(response) - 1))
            targets.extend((at, token, num_responses) for at, token in zip(predictors, response, strict=True))
            tokens.extend(response[:-1])
            position_ids.extend(range(len(prompt), len(prompt) + len(response) - 1))
            num_responses += 1
    return Rows(
        tokens=_held(tokens, layout),
        position_ids=_held(position_ids, layout),
        targets=_held_targets(targets, layout, num_responses, diagnostics),
        num_tokens=sum(len(prompt) + len(response) for prompt, responses in bundles for response in responses),
        places=length,
        used=len(tokens),
        prompt_tokens=sum(len(prompt) * len(responses) for prompt, responses in bundles),
        prompt_places=sum(len(prompt) for prompt, _ in bundles),
        layout=layout,
    )


def _held(values: list[int], layout: RowLayout) -> Tensor:
    """The values of this rank's tokens, zero for padding, int64 [1, length / CP]."""
    row = torch.zeros(layout.length, dtype=torch.int64)
    row[: len(values)] = torch.tensor(values, dtype=torch.int64)
    return row[layout.held][None]


def _held_targets(
    targets: list[tuple[int, int, int]], layout: RowLayout, num_responses: int, diagnostics: bool
) -> ResponseTargets:
    """The targets whose predicting positions this rank holds, at their place among its tokens."""
    place = torch.full((layout.length,), -1, dtype=torch.int64)
    place[layout.held] = torch.arange(len(layout.held))
    at, token_ids, owners = torch.tensor(targets, dtype=torch.int64).reshape(-1, 3).unbind(1)
    positions = place[at]
    here = positions >= 0
    return ResponseTargets(positions[here], token_ids[here], owners[here], num_responses, diagnostics)
