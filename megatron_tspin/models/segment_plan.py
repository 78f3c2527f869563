"""How the CPU backend `segments` attends over a packed row: which bundles block by block, which side by side.

Block by block a bundle takes some calls of the kernel and computes nothing twice. Side by side each response with a
copy of its prompt is an ordinary causal sequence, and sequences of about the same length, of any bundles, take one call
together. Small bundles are dear by the call, large ones by the pairs that are computed; each goes the cheaper way.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_tspin.models.row_layout import AttentionBlock, Bundle, RowLayout

# Prices in computed pairs of query and key, of one head of size 1. Measured with torch 2.13 on one thread of an AMD
# EPYC with AVX-512, forward and backward, fp32: a pair 0.35 to 0.55 ns a head and dimension (squares of 32 to 1024), a
# call with its slices and sums some 80 us (4 to 24 bundles of 32 tokens, both ways), about 200,000 pairs. Half of it
# was as good in noisy trials on the quickstart's rows. The price of a token copied in and out is from single copies,
# 0.15 ns a number.
_CALL = 100_000.0
_TOKEN = 4.0
# The kernel takes a third longer over 127 tokens than over 128, and no longer over 120.
_LENGTH_MULTIPLE = 8


@dataclass(frozen=True)
class CausalSequence:
    """A prompt and one of its responses, as they lie in the row.

    Attributes:
        bundle: Number of the bundle.
        prompt: [start, end) of the prompt.
        response: [start, end) of the response, which may be empty.
        copies_prompt: An earlier sequence stands for the prompt's output.
    """

    bundle: int
    prompt: tuple[int, int]
    response: tuple[int, int]
    copies_prompt: bool

    def __len__(self) -> int:
        return self.prompt[1] - self.prompt[0] + self.response[1] - self.response[0]


@dataclass(frozen=True)
class SequenceBatch:
    """Causal sequences side by side, filled up at their ends to one length by copies of their last tokens.

    Attributes:
        sequences: Longest first.
        key_groups: Key-value heads, which the kernel takes as part of the batch: keys are never repeated.
    """

    sequences: tuple[CausalSequence, ...]
    key_groups: int

    @property
    def length(self) -> int:
        """Places of each sequence, L."""
        return -(-len(self.sequences[0]) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE

    @cached_property
    def places(self) -> Tensor:
        """int64 [key groups x sequences x L]: token x key groups + key group of each place."""
        filled = torch.empty(len(self.sequences), self.length, dtype=torch.int64)
        for row, sequence in zip(filled, self.sequences, strict=True):
            prompt = sequence.prompt[1] - sequence.prompt[0]
            row[:prompt] = torch.arange(*sequence.prompt)
            row[prompt : len(sequence)] = torch.arange(*sequence.response)
            row[len(sequence) :] = row[len(sequence) - 1].item()
        return (filled * self.key_groups + torch.arange(self.key_groups)[:, None, None]).flatten()

    @cached_property
    def owners(self) -> Tensor | None:
        """Bool [key groups x sequences, 1, L, 1]: whether the place's output is its token's. None if all are."""
        owned = torch.zeros(len(self.sequences), self.length, dtype=torch.bool)
        for row, sequence in zip(owned, self.sequences, strict=True):
            first = sequence.prompt[1] - sequence.prompt[0] if sequence.copies_prompt else 0
            row[first : len(sequence)] = True
        return None if bool(owned.all()) else owned.repeat(self.key_groups, 1)[:, None, :, None]


@dataclass(frozen=True)
class SegmentPlan:
    """The ways of a row's bundles.

    Attributes:
        blocks: Of the bundles that go block by block.
        batches: Of those that go side by side.
        outside: [start, end) of the row's tokens that are in no batch, padding included.
        source: int64 [tokens x key groups]: the place, counted through all batches, whose output is the token's; 0
            outside.
    """

    blocks: list[AttentionBlock]
    batches: list[SequenceBatch]
    outside: list[tuple[int, int]]
    source: Tensor


def plan_segments(layout: RowLayout, heads: int, key_groups: int, head_dim: int) -> SegmentPlan:
    """Chooses the cheaper way of each bundle. Under context parallelism all go by blocks: ranks hold parts of them.

    Args:
        layout: The row.
        heads: Query heads of this rank.
        key_groups: Key-value heads of this rank.
        head_dim: Size of a head.
    """
    call = _CALL / (heads * head_dim)
    sequences = [] if layout.context.size > 1 else _small_sequences(layout, call)
    small = {sequence.bundle for sequence in sequences}
    batches = [SequenceBatch(tuple(part), key_groups) for part in _of_similar_length(sequences, call)]
    if not batches:
        return SegmentPlan(layout.blocks, [], [], torch.empty(0, dtype=torch.int64))
    return SegmentPlan(
        blocks=layout.blocks_of(number for number in range(len(layout.bundles)) if number not in small),
        batches=batches,
        outside=_outside(layout, small),
        source=_source(layout, batches, key_groups),
    )


def _small_sequences(layout: RowLayout, call: float) -> list[CausalSequence]:
    """The sequences of all bundles that are cheaper side by side."""
    found: list[CausalSequence] = []
    start = 0
    for number, bundle in enumerate(layout.bundles):
        if _side_by_side(bundle) < _block_by_block(bundle, call):
            found += _sequences(number, bundle, start)
        start += bundle.tokens
    return found


def _sequences(number: int, bundle: Bundle, start: int) -> Iterable[CausalSequence]:
    """One for each response that has tokens; the prompt alone where none has."""
    prompt = (start, start + bundle.prompt)
    end = prompt[1]
    sizes = [size for size in bundle.responses if size] or [0]
    for copies, size in enumerate(sizes):
        yield CausalSequence(number, prompt, (end, end + size), copies_prompt=copies > 0)
        end += size


def _triangle(length: int) -> float:
    return length * (length + 1) / 2


def _side_by_side(bundle: Bundle) -> float:
    """The price of a bundle in pairs, without the calls, which it shares."""
    lengths = [bundle.prompt + size for size in bundle.responses if size] or [bundle.prompt]
    return sum(_triangle(length) + _TOKEN * length for length in lengths)


def _block_by_block(bundle: Bundle, call: float) -> float:
    """The price in pairs: a square of the prompt with its first response, a square and a rectangle of each other."""
    first, *others = [size for size in bundle.responses if size] or [0]
    pairs = _triangle(bundle.prompt + first) + sum(_triangle(size) + size * bundle.prompt for size in others)
    return pairs + call * (len(others) + (2 if others else 1))


def _of_similar_length(sequences: Sequence[CausalSequence], call: float) -> list[list[CausalSequence]]:
    """Longest first; a new batch begins where filling up would have cost more than its call does."""
    batches: list[list[CausalSequence]] = []
    waste = 0.0
    for sequence in sorted(sequences, key=len, reverse=True):
        if batches:
            longest = len(batches[-1][0])
            waste += _triangle(longest) - _triangle(len(sequence)) + _TOKEN * (longest - len(sequence))
        if not batches or waste > call:
            batches.append([])
            waste = 0.0
        batches[-1].append(sequence)
    return batches


def _outside(layout: RowLayout, small: set[int]) -> list[tuple[int, int]]:
    """The stretches of the row between bundles in `small`, and its padding."""
    stretches: list[tuple[int, int]] = []
    start = reached = 0
    for number, bundle in enumerate(layout.bundles):
        if number in small:
            if reached < start:
                stretches.append((reached, start))
            reached = start + bundle.tokens
        start += bundle.tokens
    return [*stretches, (reached, layout.length)] if reached < layout.length else stretches


def _source(layout: RowLayout, batches: Sequence[SequenceBatch], key_groups: int) -> Tensor:
    source = torch.zeros(layout.length * key_groups, dtype=torch.int64)
    first = 0
    for batch in batches:
        numbers = torch.arange(first, first + len(batch.places))
        owned = slice(None) if batch.owners is None else batch.owners.flatten()
        source[batch.places[owned]] = numbers[owned]
        first += len(batch.places)
    return source
