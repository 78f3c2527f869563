import math
import statistics

import pytest

from megatron_tspin.benchmark.lengths import DISTRIBUTIONS, draw_lengths, draw_tokens, response_tokens

MANY = 4000


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_lengths_are_the_seeds_and_fit(name: str) -> None:
    drawn = draw_lengths(name, 64, 512, seed=3)
    assert drawn == draw_lengths(name, 64, 512, seed=3)
    assert len(drawn) == 64
    for shape in drawn:
        assert len(shape.responses) == 3
        assert 1 <= shape.prompt <= 256
        assert all(1 <= length <= 512 - shape.prompt for length in shape.responses)


@pytest.mark.parametrize("name", [name for name in DISTRIBUTIONS if name != "all_equal"])
def test_another_seed_draws_other_lengths_with_the_stated_means(name: str) -> None:
    shape = DISTRIBUTIONS[name]
    assert draw_lengths(name, 8, 512, seed=0) != draw_lengths(name, 8, 512, seed=1)
    drawn = draw_lengths(name, MANY, 10**6, seed=0)
    assert statistics.fmean(item.prompt for item in drawn) == pytest.approx(shape.prompt.mean, rel=0.1)
    assert response_tokens(drawn) / MANY / 3 == pytest.approx(shape.response.mean, rel=0.05)
    spread = statistics.stdev(math.log(item.prompt) for item in drawn)
    assert spread == pytest.approx(shape.prompt.sigma, rel=0.1)


def test_responses_of_a_prompt_are_alike_but_not_the_same() -> None:
    drawn = draw_lengths("ultrachat", MANY, 10**6, seed=0)
    first, second, _ = zip(*([math.log(length) for length in item.responses] for item in drawn), strict=True)
    assert statistics.correlation(first, second) == pytest.approx(0.5, abs=0.05)


def test_all_equal_leaves_nothing_to_pad() -> None:
    assert len({(item.prompt, item.responses) for item in draw_lengths("all_equal", 16, 2048, seed=0)}) == 1


def test_tokens_have_the_lengths_and_are_in_the_vocabulary() -> None:
    lengths = draw_lengths("short_prompt", 5, 64, seed=0)
    batch = draw_tokens(lengths, 11, seed=7)
    assert batch == draw_tokens(lengths, 11, seed=7) != draw_tokens(lengths, 11, seed=8)
    assert [len(triplet.prompt) for triplet in batch] == [item.prompt for item in lengths]
    assert [tuple(map(len, triplet.responses)) for triplet in batch] == [item.responses for item in lengths]
    used = {token for triplet in batch for ids in (triplet.prompt, *triplet.responses) for token in ids}
    assert used == set(range(3, 11))
