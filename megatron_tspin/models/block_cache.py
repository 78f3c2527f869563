"""Keys and values of sequences that grow token by token, in blocks; the attention of a step of generation over them.

A sequence takes blocks of `BLOCK` tokens as it grows, the lowest free ones first, so that what is in use stays together
at the front of one tensor a layer. A decoding token is scored against each block of its sequence where it lies, all
blocks of all sequences in one batch of matrix products, and the blocks' softmaxes are joined: no key is copied, and no
sequence is padded further than to the end of its last block. The blocks of a sequence are joined in its own order, so
where they lie leaves no trace in the result.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from megatron_tspin.models.packed_attention import PackedAttention
from megatron_tspin.models.prompt_row import PromptRow
from megatron_tspin.models.scores import Scores
from megatron_tspin.platform import to_device

BLOCK = 64
"""Tokens of a block. On a CPU products with 32 took a fifth longer (64 sequences of 110 to 230 tokens)."""

_FEW = 16
"""Blocks in use that are not worth moving together."""

_NOWHERE = 2**40
"""Position of what no token sees."""


@dataclass(eq=False)
class CachedSequence:
    """A sequence in a cache: its tokens so far, and the blocks that hold them, in order."""

    length: int = 0
    blocks: list[int] = field(default_factory=list)


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK)


class BlockCache:
    """The blocks of a rank's layers; a block has one number, whatever the layer.

    Args:
        blocks: How many there are.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free = list(range(blocks))  # a heap
        self._reached = 0  # blocks at the front that have been taken at some time
        self._pools: dict[int, tuple[Tensor, Tensor]] = {}
        self._zeroed: dict[int, int] = {}

    @property
    def used(self) -> int:
        """Blocks that hold a sequence."""
        return self.blocks - len(self._free)

    def extend(self, sequence: CachedSequence, tokens: int) -> None:
        """Makes room for more tokens, which the next step writes.

        Raises:
            ValueError: No block is free.
        """
        sequence.length += tokens
        while len(sequence.blocks) < blocks_for(sequence.length):
            if not self._free:
                raise ValueError(f"all {self.blocks} blocks of the key-value cache are taken")
            sequence.blocks.append(heapq.heappop(self._free))
            self._reached = max(self._reached, sequence.blocks[-1] + 1)

    def release(self, sequence: CachedSequence) -> None:
        """Takes the blocks of a sequence back."""
        for block in sequence.blocks:
            heapq.heappush(self._free, block)
        sequence.blocks, sequence.length = [], 0

    def gather(self, sequences: Sequence[CachedSequence]) -> None:
        """Moves the blocks of all sequences to the front, if more than half of the front is free."""
        front = 1 + max((block for sequence in sequences for block in sequence.blocks), default=-1)
        if front < max(_FEW, 2 * self.used):
            return
        target = iter(range(self.used))
        taken = {block for sequence in sequences for block in sequence.blocks if block < self.used}
        moved = {
            block: next(place for place in target if place not in taken)
            for sequence in sequences
            for block in sequence.blocks
            if block >= self.used
        }
        old, new = list(moved), list(moved.values())
        for pools in self._pools.values():
            for pool in pools:
                pool[new] = pool[old]
        for sequence in sequences:
            sequence.blocks = [moved.get(block, block) for block in sequence.blocks]
        self._free = list(range(self.used, self.blocks))

    def pools(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [blocks, key groups, BLOCK, d] each.

        Args:
            layer: Any number of its own.
            key: [tokens, key groups, d], for shape, type and device.
            value: [tokens, key groups, d], likewise.
        """
        if layer not in self._pools:
            keys, values = (each.new_empty(self.blocks, each.shape[1], BLOCK, each.shape[2]) for each in (key, value))
            self._pools[layer] = keys, values
        keys, values = self._pools[layer]
        # A value without probability must not be infinity or NaN. Zeroed when first needed, as a CPU is slow to give
        # memory, and most answers end early.
        values[self._zeroed.get(layer, 0) : self._reached] = 0
        self._zeroed[layer] = self._reached
        return keys, values

    def step(self, sequences: Sequence[CachedSequence], prompts: PromptRow) -> "StepLayout":
        """One more token of each sequence, and the prompts of sequences behind them in the list.

        Args:
            sequences: Those of the prompts are last, and empty.
            prompts: The row of the prompts.

        Raises:
            ValueError: There are not blocks enough.
        """
        decoding = len(sequences) - len(prompts.places)
        for sequence, tokens in zip(sequences, [1] * decoding + list(map(len, prompts.places)), strict=True):
            self.extend(sequence, tokens)
        return StepLayout(cache=self, sequences=tuple(sequences), prompts=prompts)


@dataclass
class StepLayout(PackedSeqParams):
    """The one packed row of a step of generation: first the next token of some sequences, then the row of the prompts.

    It reaches the attention of every layer through megatron-core's `packed_seq_params`.

    Attributes:
        cache: Where the sequences are; has room for the step's tokens.
        sequences: Those that decode, then those of the prompts; lengths with the step's tokens.
        prompts: The prompts' row.
    """

    qkv_format: str = "sbhd"  # as `RowLayout`'s
    cache: BlockCache = field(default_factory=lambda: BlockCache(0))
    sequences: tuple[CachedSequence, ...] = ()
    prompts: PromptRow = PromptRow(0, (), ())
    _masks: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def decoding(self) -> int:
        """Sequences that go on by one token."""
        return len(self.sequences) - len(self.prompts.places)

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return self.decoding + self.prompts.tokens

    @cached_property
    def position_ids(self) -> Tensor:
        """int64 [1, tokens]."""
        decoding = [sequence.length - 1 for sequence in self.sequences[: self.decoding]]
        return to_device(np.concatenate((np.array(decoding, dtype=np.int64), self.prompts.positions)))[None]

    @cached_property
    def last_tokens(self) -> Tensor:
        """Where in the row each sequence ends, int64 [sequences]."""
        return to_device(np.array([places[-1] for places in self._rows_of], dtype=np.int64))

    @cached_property
    def _rows_of(self) -> list[NDArray[np.int64]]:
        """Of each sequence, where in the row its tokens are."""
        decoding = list(np.arange(self.decoding)[:, None])
        return decoding + [self.decoding + places for places in self.prompts.places]

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where tokens of the row go, int64 [written] each: place in the row, block, offset in the block.

        A token that several sequences share goes to each of them.
        """
        positions = [
            np.arange(sequence.length - len(rows), sequence.length)
            for sequence, rows in zip(self.sequences, self._rows_of, strict=True)
        ]
        blocks = [
            np.asarray(sequence.blocks)[position // BLOCK]
            for sequence, position in zip(self.sequences, positions, strict=True)
        ]
        offsets = np.concatenate(positions) % BLOCK
        return to_device(np.concatenate(self._rows_of)), to_device(np.concatenate(blocks)), to_device(offsets)

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Who owns the blocks at the front, which free ones may lie between.

        Returns:
            Owner and first position of each block, int64 [blocks]; the blocks of all decoding sequences one after the
            other, int64 [their number]; and where each sequence begins among them, int64 [decoding].
        """
        held = [sequence.blocks for sequence in self.sequences[: self.decoding]]
        counts, order = list(map(len, held)), np.concatenate(held)
        owner, first = np.zeros(1 + order.max(), dtype=np.int64), np.full(1 + order.max(), _NOWHERE)
        owner[order] = np.repeat(np.arange(len(held)), counts)
        first[order] = BLOCK * np.concatenate(list(map(np.arange, counts)))
        starts = np.cumsum([0, *counts[:-1]])
        return to_device(owner), to_device(first), to_device(order), to_device(starts)

    def _hidden(self, window: int | None) -> Tensor:
        """Bool [blocks, 1, 1, BLOCK]: whether the owner's token does not see the place."""
        if window not in self._masks:
            owner, first, _, _ = self._tables
            here = self.position_ids[0, : self.decoding].index_select(0, owner)[:, None]
            place = first[:, None] + torch.arange(BLOCK, device=first.device)
            hidden = place > here
            if window is not None:
                hidden |= here - place >= window
            self._masks[window] = hidden[:, None, None]
        return self._masks[window]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores, packed: PackedAttention
    ) -> Tensor:
        """Writes the step's keys and values, and attends.

        Args:
            layer: Number of the layer.
            query: [tokens, heads, d].
            key: [tokens, key groups, d].
            value: [tokens, key groups, d].
            scores: How this layer scores keys.
            packed: The backend for the prompts.

        Returns:
            [tokens, heads, d].
        """
        keys, values = self.cache.pools(layer, key, value)
        row, block, offset = self._places
        keys[block, :, offset] = key[row]
        values[block, :, offset] = value[row]
        count = self.decoding
        parts = []
        if count:
            parts.append(self._decode(query[:count], keys, values, scores))
        if self.prompts.tokens:
            parts.append(packed(query[count:], key[count:], value[count:], self.prompts.layout, scores))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(self, query: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Tensor:
        """One query [decoding, heads, d] a sequence over its blocks; returns [decoding, heads, d]."""
        owner, _, order, starts = self._tables
        front, groups, size, width = len(owner), *keys.shape[1:]
        grouped = query.view(len(query), groups, -1, width).index_select(0, owner)
        found = _products(grouped.flatten(0, 1), keys[:front].flatten(0, 1).transpose(1, 2)).mul_(scores.scale)
        found = found.view(*grouped.shape[:3], size)
        if scores.cap is not None:
            found = found.div_(scores.cap).tanh_().mul_(scores.cap)
        found.masked_fill_(self._hidden(scores.window), -torch.inf)

        def joined(blocks: Tensor, mode: str) -> Tensor:
            """Over the blocks of each sequence, [decoding, columns] of [blocks, columns]."""
            return F.embedding_bag(order, blocks, starts, mode=mode)

        largest = joined(found.amax(-1).flatten(1), "max").view(-1, *grouped.shape[1:3])
        weights = found.sub_(largest.index_select(0, owner)[..., None]).exp_()
        part = _products(weights.to(values.dtype).flatten(0, 1), values[:front].flatten(0, 1))
        total = joined(weights.sum(-1).flatten(1), "sum").view(*largest.shape, 1)
        out = joined(part.view(front, -1), "sum").view(*largest.shape, width).div_(total)
        return out.reshape(query.shape).to(query.dtype)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Products of [n, i, j] and [n, j, k], summed and returned in fp32."""
    if left.dtype == torch.float32:
        return torch.bmm(left, right)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())
