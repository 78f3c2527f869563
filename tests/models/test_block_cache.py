"""Attention over a cache of blocks is that over the whole sequence, wherever the blocks lie."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_tspin.models.attention import CausalAttention
from megatron_tspin.models.block_cache import BLOCK, BlockCache, CachedSequence
from megatron_tspin.models.row_layout import Bundle, RowLayout
from megatron_tspin.models.scores import Scores

HEADS, GROUPS, DIM, LAYERS = 4, 2, 8, 2


def layers(window: int | None, cap: float | None) -> list[CausalAttention]:
    config = SimpleNamespace(packed_attention="segments")
    return [CausalAttention(config, number, Scores(0.3, window, cap)) for number in range(LAYERS)]


class Text:
    """A sequence with all its queries, keys and values, of which the cache learns bit by bit."""

    def __init__(self, length: int, prompt: int, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = (HEADS, GROUPS, GROUPS)
        self.parts = [
            [torch.randn(length, 1, count, DIM, generator=generator).to(dtype) for count in sizes]
            for _ in range(LAYERS)
        ]
        self.length, self.prompt = length, prompt
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
        step = cache.step([text.cached for text in live], [text.prompt for text in new])
        starts = [text.cached.length - 1 for text in live[: len(live) - len(new)]] + [0] * len(new)
        spans = [slice(start, text.cached.length) for start, text in zip(starts, live, strict=True)]
        assert step.position_ids[0].tolist() == [i for span in spans for i in range(span.start, span.stop)]
        for number, layer in enumerate(attention):
            given = zip(
                *[[each[span] for each in text.parts[number]] for text, span in zip(live, spans, strict=True)],
                strict=True,
            )
            out = layer(*map(torch.cat, given), packed_seq_params=step)
            sizes = [span.stop - span.start for span in spans]
            for text, part in zip(live, out.split(sizes), strict=True):
                text.found[number].append(part)
            assert torch.cat([part[-1:] for part in out.split(sizes)]).equal(out[step.last_tokens])
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
    run(texts, attention, cache, slots if slots < 40 else 15)
    assert cache.used == 0
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
    cache.step(sequences, [BLOCK] * 20)
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
