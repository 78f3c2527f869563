import random
from statistics import pstdev
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tspin.data.batch_order import GlobalBatchSampler, sample_examples
from megatron_tspin.data.steps import steps_per_iteration

sizes = st.integers(1, 60)


@settings(deadline=None)  # the machines of CI are shared
@given(sizes, sizes, st.integers(0, 2**70), st.integers(0, 5), st.integers(1, 3))
def test_each_epoch_meets_each_example_once(
    num_examples: int, batch_size: int, seed: int, iteration: int, epochs: int
) -> None:
    sampler = GlobalBatchSampler(num_examples, batch_size, seed, iteration)
    per_epoch = steps_per_iteration(num_examples, batch_size, 1, None)
    assert steps_per_iteration(num_examples, batch_size, epochs, None) == epochs * per_epoch
    for epoch in range(epochs):
        batches = [sampler.batch(epoch * per_epoch + step) for step in range(per_epoch)]
        assert sorted(index for batch in batches for index in batch) == list(range(num_examples))
        assert all(len(batch) == batch_size for batch in batches[:-1]) and 1 <= len(batches[-1]) <= batch_size


@settings(deadline=None)  # the machines of CI are shared
@given(sizes, sizes, st.lists(st.integers(0, 200), max_size=6))
def test_a_batch_depends_on_its_step_alone(num_examples: int, batch_size: int, steps: list[int]) -> None:
    used = GlobalBatchSampler(num_examples, batch_size, 7, 1)
    for step in steps:
        assert used.batch(step) == GlobalBatchSampler(num_examples, batch_size, 7, 1).batch(step)


def test_seed_iteration_and_epoch_each_change_the_order() -> None:
    def order(seed: int, iteration: int, step: int = 0) -> tuple[int, ...]:
        return tuple(GlobalBatchSampler(100, 100, seed, iteration).batch(step))

    assert len({order(1, 0), order(2, 0), order(1, 1), order(1, 0, step=1), tuple(range(100))}) == 5


def test_the_order_is_the_same_on_every_machine_and_numpy() -> None:
    assert GlobalBatchSampler(8, 8, 1234, 0).batch(0) == [1, 6, 2, 0, 3, 5, 7, 4]


cost = st.floats(0.0, 1e9) | st.integers(0, 3)


@st.composite
def balanced_epochs(draw: Any) -> tuple[list[float], int, list[list[int]]]:
    """Costs, batch size, and the batches of a random epoch."""
    costs, batch_size = draw(st.lists(cost, min_size=1, max_size=60)), draw(sizes)
    sampler = GlobalBatchSampler(len(costs), batch_size, draw(st.integers(0, 2**70)), draw(st.integers(0, 5)), costs)
    per_epoch = steps_per_iteration(len(costs), batch_size, 1, None)
    start = draw(st.integers(0, 3)) * per_epoch
    return costs, batch_size, [sampler.batch(start + step) for step in range(per_epoch)]


@given(epoch=balanced_epochs())
def test_a_balanced_epoch_meets_each_example_once(epoch: Any) -> None:
    costs, batch_size, batches = epoch
    assert sorted(index for batch in batches for index in batch) == list(range(len(costs)))
    assert all(len(batch) == batch_size for batch in batches[:-1]) and 1 <= len(batches[-1]) <= batch_size


@given(epoch=balanced_epochs())
def test_balanced_batches_cost_about_the_same(epoch: Any) -> None:
    """One of each stratum: no two full batches differ by more than the dearest example does from the cheapest."""
    costs, batch_size, batches = epoch
    totals = [sum(costs[i] for i in batch) for batch in batches if len(batch) == batch_size]
    assert not totals or max(totals) - min(totals) <= (max(costs) - min(costs)) * (1 + 1e-9)


@given(st.integers(1, 60), st.integers(1, 80), st.integers(0, 2**70), st.integers(0, 5))
def test_a_sample_has_no_example_twice(num_examples: int, count: int, seed: int, iteration: int) -> None:
    found = sample_examples(num_examples, count, seed, iteration)
    assert found == sorted(set(found)) and set(found) <= set(range(num_examples))
    assert len(found) == min(count, num_examples)


def test_seed_and_iteration_each_change_the_sample() -> None:
    found = {tuple(sample_examples(100, 20, seed, iteration)) for seed, iteration in ((1, 0), (2, 0), (1, 1))}
    assert len(found) == 3
    first_epochs = [tuple(sorted(GlobalBatchSampler(100, 20, 1, 0).batch(step))) for step in range(0, 15, 5)]
    assert not found & set(first_epochs), "the sample has a key of its own"
    assert sample_examples(20, 5, 1234, 0) == [0, 2, 7, 17, 19], "on every machine and numpy"


def lognormal(count: int) -> list[float]:
    chance = random.Random(1)
    return [chance.lognormvariate(0.0, 1.0) for _ in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_balanced_batches_are_far_more_alike_than_shuffled_ones(seed: int) -> None:
    chance = random.Random(1)
    costs = [max(1.0, chance.gauss(500, 150)) for _ in range(1000)]

    def spread(sampler: GlobalBatchSampler) -> float:
        return pstdev(sum(costs[i] for i in sampler.batch(step)) for step in range(20))

    balanced = spread(GlobalBatchSampler(1000, 50, seed, 0, costs))
    assert balanced < 0.15 * spread(GlobalBatchSampler(1000, 50, seed, 0))


def test_what_is_left_for_the_last_step_is_of_all_costs() -> None:
    costs = [float(i) for i in range(1000)]
    last = GlobalBatchSampler(1000, 64, 5, 0, costs).batch(15)
    assert len(last) == 40
    assert all(sum(low <= index < low + 250 for index in last) == 10 for low in (0, 250, 500, 750))


@given(st.integers(1, 40), sizes, st.lists(st.integers(0, 200), max_size=6))
def test_a_balanced_batch_depends_on_its_step_alone(num_examples: int, batch_size: int, steps: list[int]) -> None:
    costs = lognormal(num_examples)
    used = GlobalBatchSampler(num_examples, batch_size, 7, 1, costs)
    for step in steps:
        assert used.batch(step) == GlobalBatchSampler(num_examples, batch_size, 7, 1, costs).batch(step)


def test_seed_iteration_and_epoch_each_change_a_balanced_order() -> None:
    def batches(seed: int, iteration: int, epoch: int = 0) -> frozenset[frozenset[int]]:
        sampler = GlobalBatchSampler(60, 6, seed, iteration, lognormal(60))
        return frozenset(frozenset(sampler.batch(10 * epoch + step)) for step in range(10))

    found = [batches(1, 0), batches(2, 0), batches(1, 1), batches(1, 0, epoch=1)]
    assert len(set(found)) == 4, "other examples meet, not only in another order"


@pytest.mark.parametrize("costs", [[float(i) for i in range(12)], [1.0] * 12], ids=["rising", "alike"])
def test_any_example_may_come_at_any_step(costs: list[float]) -> None:
    """Three steps of four: over 600 seeds each example is met about 200 times by each step."""
    counts = [[0] * 3 for _ in range(12)]
    for seed in range(600):
        sampler = GlobalBatchSampler(12, 4, seed, 0, costs)
        for step in range(3):
            for index in sampler.batch(step):
                counts[index][step] += 1
    assert all(130 < count < 270 for of_example in counts for count in of_example)  # six standard deviations


def test_the_balanced_order_is_the_same_on_every_machine_and_numpy() -> None:
    sampler = GlobalBatchSampler(8, 3, 1234, 0, [5.0, 1.0, 4.0, 4.0, 2.0, 9.0, 0.0, 3.0])
    assert [sampler.batch(step) for step in range(3)] == [[1, 2, 0], [6, 7, 3], [4, 5]]


def test_train_iters_overrides_epochs_and_runs_on_into_the_next_epoch() -> None:
    assert steps_per_iteration(10, 4, 2, None) == 6
    assert steps_per_iteration(10, 4, 2, 5) == 5
    sampler = GlobalBatchSampler(10, 4, 0, 0)
    assert [len(sampler.batch(step)) for step in range(7)] == [4, 4, 2, 4, 4, 2, 4]
