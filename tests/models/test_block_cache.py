"""Attention over a cache of blocks is that over the whole sequence, wherever the blocks lie."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_tspin.models.attention import CausalAttention
from megatron_tspin.models.block_cache import BLOCK, BlockCache, CachedSequence
from megatron_tspin.models.prompt_row import prompt_row
from megatron_tspin.models.row_layout import Bundle, RowLayout
from megatron_tspin.models.scores import Scores

HEADS, GROUPS, DIM, LAYERS = 4, 2, 8, 2


def layers(window: int | None, cap: float | None) -> list[CausalAttention]:
    config = SimpleNamespace(packed_attention="segments")
    return [CausalAttention(config, number, Scores(0.3, window, cap)) for number in range(LAYERS)]


class Text:
    """A sequence with all its queries, keys and values, of which the cache learns bit by bit.

    Args:
        length: Tokens.
        prompt: Of them, those of its prompt.
        seed: Of all that is its own.
        dtype: Of its queries, keys and values.
        shared: The first tokens are those of a text with another seed.
    """

    def __init__(
        self, length: int, prompt: int, seed: int, dtype: torch.dtype, shared: "tuple[Text, int] | None" = None
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = (HEADS, GROUPS, GROUPS)
        self.parts = [
            [torch.randn(length, 1, count, DIM, generator=generator).to(dtype) for count in sizes]
            for _ in range(LAYERS)
        ]
        self.ids = [seed] * prompt
        if shared is not None:
            other, count = shared
            self.ids[:count] = other.ids[:count]
            for own, others in zip(self.parts, other.parts, strict=True):
                for tensor, same in zip(own, others, strict=True):
                    tensor[:count] = same[:count]
        self.length = length
        self.cached = CachedSequence()
        self.found: list[list[Tensor]] = [[] for _ in range(LAYERS)]

    def whole(self, attention: list[CausalAttention]) -> list[Tensor]:
        layout = RowLayout(bundles=(Bundle(self.length, ()),), length=self.length)
        return [layer(*part, packed_seq_params=layout) for layer, part in zip(attention, self.parts, strict=True)]


def run(texts: list[Text], attention: list[CausalAttention], cache: BlockCache, slots: int) -> None:
    """As the engine does: texts take a slot when one is free, and leave when they are complete."""
    waiting, live = list(texts), []
    while waiting or live:
        new = [waiting.pop(0) for _ in range(min(slots - len(live), len(waiting)))]
        live += new
        _, row = prompt_row([text.ids for text in new])
        step = cache.step([text.cached for text in live], row)
        count = len(live) - len(new)
        places = [torch.tensor([i]) for i in range(count)] + [count + torch.from_numpy(each) for each in row.places]
        lengths = [text.cached.length for text in live]
        spans = [slice(end - len(place), end) for end, place in zip(lengths, places, strict=True)]
        found = list(zip(live, spans, places, strict=True))
        for _, span, place in found:
            assert step.position_ids[0, place].tolist() == list(range(span.start, span.stop))
        for number, layer in enumerate(attention):
            given = [torch.zeros(step.tokens, *part.shape[1:], dtype=part.dtype) for part in live[0].parts[number]]
            for text, span, place in found:
                for whole, part in zip(given, text.parts[number], strict=True):
                    whole[place] = part[span]
            out = layer(*given, packed_seq_params=step)
            for text, _, place in found:
                text.found[number].append(out[place])
            assert torch.stack([out[place[-1]] for place in places]).equal(out[step.last_tokens])
        for text in [text for text in live if text.cached.length == text.length]:
            cache.release(text.cached)
            live.remove(text)
        cache.gather([text.cached for text in live])


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3, 70, 100])
@pytest.mark.parametrize("slots", [1, 3, 40])
def test_any_slots_give_what_one_pass_gives(slots: int, window: int | None, cap: float | None) -> None:
    chance = random.Random(1)
    lengths = [2, 3, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 150, *(chance.randint(2, 90) for _ in range(20))]
    texts = [Text(length, chance.randint(1, length - 1), seed, torch.float32) for seed, length in enumerate(lengths)]
    attention = layers(window, cap)
    cache = BlockCache(40)
    for number in range(LAYERS):
        for pool in cache.pools(number, *[torch.zeros(1, GROUPS, DIM)] * 2):
            pool.fill_(torch.nan)  # as memory may come
    run(texts, attention, cache, slots if slots < 40 else 15)
    assert cache.used == 0
    for text in texts:
        for found, whole in zip(text.found, text.whole(attention), strict=True):
            assert torch.allclose(torch.cat(found), whole, atol=2e-6)


@pytest.mark.parametrize("window", [None, 20])
def test_what_prompts_begin_with_is_computed_once(window: int | None) -> None:
    first = Text(BLOCK + 30, BLOCK + 10, 0, torch.float32)
    texts = [first, *(Text(90 + seed, 80, seed, torch.float32, (first, BLOCK + 3)) for seed in range(1, 4))]
    texts += [Text(100, len(first.ids), 4, torch.float32, (first, len(first.ids)))]  # another answer to the first one
    _, row = prompt_row([text.ids for text in texts])
    assert row.shared == BLOCK + 3 and row.rests == (7, 13, 13, 13) and row.rest_of == (0, 1, 2, 3, 0)
    attention = layers(window, None)
    run(texts, attention, BlockCache(12), 5)
    for text in texts:
        for found, whole in zip(text.found, text.whole(attention), strict=True):
            assert torch.allclose(torch.cat(found), whole, atol=2e-6)


def test_bf16() -> None:
    texts = [Text(80 + 3 * seed, 70, seed, torch.bfloat16) for seed in range(3)]
    attention = layers(None, None)
    run(texts, attention, BlockCache(8), 3)
    for text in texts:
        for found, whole in zip(text.found, text.whole(attention), strict=True):
            assert torch.allclose(torch.cat(found).float(), whole.float(), atol=0.02)


def test_blocks_are_moved_together_with_what_they_hold() -> None:
    cache = BlockCache(40)
    sequences = [CachedSequence() for _ in range(20)]
    cache.step(sequences, prompt_row([[i] * BLOCK for i in range(20)])[1])
    keys, _ = cache.pools(1, *[torch.zeros(1, GROUPS, DIM)] * 2)
    keys[:] = torch.arange(40.0)[:, None, None, None]
    for sequence in sequences[:18]:
        cache.release(sequence)
    held = [keys[sequence.blocks].clone() for sequence in sequences[18:]]
    cache.gather(sequences[18:])
    assert sorted(block for sequence in sequences[18:] for block in sequence.blocks) == [0, 1]
    assert all(keys[sequence.blocks].equal(before) for sequence, before in zip(sequences[18:], held, strict=True))
    more = CachedSequence()
    cache.extend(more, 38 * BLOCK)
    assert sorted(more.blocks) == list(range(2, 40))
    with pytest.raises(ValueError, match="all 40 blocks"):
        cache.extend(more, 1)
