"""Where the prompts and responses of a packed row lie, and which of its tokens see which.

A packed row is a sequence of bundles: a prompt, then its responses one after another. A response sees the prompt and
itself; positions restart behind the prompt for each response. A bundle with one response is an ordinary causal
sequence. The prompt and each response are the segments of a bundle; the attention backend `segments` goes by where they
lie, without a mask.

Under context parallelism (CP) a row is cut into 2 x CP equal chunks and rank r holds chunks r and 2 x CP - 1 - r, so
that early tokens, which see few others, and late ones are shared out evenly.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

_PROMPT = 0


@dataclass(frozen=True)
class Bundle:
    """A prompt and its responses, as lengths of the tokens that are in the row; a response may have none."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the bundle in the row."""
        return self.prompt + sum(self.responses)


@dataclass(frozen=True)
class AttentionBlock:
    """Queries [query_start, query_end) see keys [key_start, key_end): all of them, or (causal) those up to themselves.

    Queries count the tokens that this rank holds, keys those of the whole row. A causal block is square.
    """

    query_start: int
    query_end: int
    key_start: int
    key_end: int
    causal: bool


@dataclass(frozen=True)
class ContextShare:
    """A rank's place among those that share each row (context parallelism)."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


WHOLE_ROW = ContextShare()


@dataclass
class RowLayout(PackedSeqParams):
    """The bundles of a packed row. It reaches the attention of every layer through megatron-core's `packed_seq_params`.

    Attributes:
        bundles: In the order of the row, which starts with the first one and ends with padding.
        length: Tokens of the row, padding included; a multiple of 2 x CP under context parallelism.
        context: Which part of the row this rank holds.
    """

    # Not "thd": megatron-core would take the batch dimension away and ask for cumulative lengths.
    qkv_format: str = "sbhd"
    bundles: tuple[Bundle, ...] = ()
    length: int = 0
    context: ContextShare = WHOLE_ROW
    _masks: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def chunks(self) -> list[tuple[int, int]]:
        """The [start, end) of the row's tokens that this rank holds, in the order it holds them."""
        if self.context.size == 1:
            return [(0, self.length)]
        size = self.length // (2 * self.context.size)
        return [(i * size, (i + 1) * size) for i in (self.context.rank, 2 * self.context.size - 1 - self.context.rank)]

    @cached_property
    def held(self) -> Tensor:
        """Row indices of this rank's tokens, int64 [length / CP]."""
        return torch.cat([torch.arange(start, end) for start, end in self.chunks])

    @cached_property
    def gathered_order(self) -> Tensor:
        """Where each token of the row lies among the tokens gathered from the CP ranks in order, int64 [length]."""
        size = self.length // (2 * self.context.size)
        chunk_of = [i for rank in range(self.context.size) for i in (rank, 2 * self.context.size - 1 - rank)]
        place = sorted(range(2 * self.context.size), key=chunk_of.__getitem__)
        return torch.cat([torch.arange(i * size, (i + 1) * size) for i in place])

    @cached_property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence: a prompt with its longest response."""
        return max((bundle.prompt + max(bundle.responses, default=0) for bundle in self.bundles), default=0)

    def segments(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Of each segment: its bundle's number, its own (0 is the prompt), start, end, start of the prompt."""
        start = 0
        for number, bundle in enumerate(self.bundles):
            first = start
            for segment, size in enumerate((bundle.prompt, *bundle.responses)):
                yield number, segment, start, start + size, first
                start += size

    @cached_property
    def blocks(self) -> list[AttentionBlock]:
        """`blocks_of` all bundles."""
        return self.blocks_of(range(len(self.bundles)))

    def blocks_of(self, numbers: Iterable[int]) -> list[AttentionBlock]:
        """What this rank's queries of some bundles see, as rectangles without masked entries and causal squares.

        Each query of a bundle is in exactly one causal block; those come first.
        """
        causal: list[AttentionBlock] = []
        whole: list[AttentionBlock] = []
        wanted = set(numbers)
        for number, start, end, prompt_start in self._causal_runs():
            if number not in wanted:
                continue
            offset = 0
            for chunk_start, chunk_end in self.chunks:
                first, last = max(start, chunk_start), min(end, chunk_end)
                if first < last:
                    query = (first - chunk_start + offset, last - chunk_start + offset)
                    causal.append(AttentionBlock(*query, first, last, causal=True))
                    if start != prompt_start:
                        prompt_end = prompt_start + self.bundles[number].prompt
                        _append(whole, AttentionBlock(*query, prompt_start, prompt_end, causal=False))
                    if first > start:
                        _append(whole, AttentionBlock(*query, start, first, causal=False))
                offset += chunk_end - chunk_start
        return causal + whole

    def _causal_runs(self) -> Iterator[tuple[int, int, int, int]]:
        """Bundle number, start, end, start of the prompt: of a prompt with its first response, of each other one."""
        start = 0
        for number, bundle in enumerate(self.bundles):
            first, *others = [size for size in bundle.responses if size] or [0]
            prompt_start = start
            for size in (bundle.prompt + first, *others):
                yield number, start, start + size, prompt_start
                start += size

    def cached(self, key: Any, make: Any) -> Any:
        """`make()`, computed once for this row: masks are shared by the layers."""
        if key not in self._masks:
            self._masks[key] = make()
        return self._masks[key]

    def token_facts(self, device: torch.device) -> Tensor:
        """int64 [3, length]: bundle (padding: -1), segment and position of each token of the row."""
        facts = torch.zeros(3, self.length, dtype=torch.int64)
        facts[0] = -1
        for number, segment, start, end, _ in self.segments():
            facts[0, start:end] = number
            facts[1, start:end] = segment
            offset = 0 if segment == _PROMPT else self.bundles[number].prompt
            facts[2, start:end] = torch.arange(offset, offset + end - start)
        return facts.to(device)


def _append(blocks: list[AttentionBlock], block: AttentionBlock) -> None:
    """Adds a block without mask; joins it with the last one where that one's queries end and the keys are the same."""
    if blocks:
        last = blocks[-1]
        keys = (block.key_start, block.key_end)
        if last.query_end == block.query_start and (last.key_start, last.key_end) == keys:
            blocks[-1] = AttentionBlock(last.query_start, block.query_end, *keys, causal=False)
            return
    blocks.append(block)
