"""The order in which a self-play iteration meets the examples."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_tspin.data.steps import steps_per_epoch


def sample_examples(num_examples: int, count: int, seed: int, iteration: int) -> list[int]:
    """A random sample of the examples for a self-play iteration, in document order; independent of its batches.

    Args:
        num_examples: Number of triplets.
        count: How many to draw; all of them if there are no more.
        seed: Seed of the run.
        iteration: Self-play iteration.
    """
    # A spawn key keeps apart from the epochs' orders, which are keyed by [seed, iteration, epoch].
    order = _random_order(num_examples, np.random.SeedSequence([seed, iteration], spawn_key=(0,)))
    return sorted(order[:count].tolist())


def _random_order(count: int, key: np.random.SeedSequence) -> NDArray[np.int64]:
    # numpy promises the raw stream of a bit generator for all versions, but not Generator.permutation.
    order: NDArray[np.int64] = np.argsort(np.random.Philox(key).random_raw(count), kind="stable")
    return order


class GlobalBatchSampler:
    """Which examples each optimizer step of a self-play iteration sees.

    Every epoch has its own order, keyed by (seed, iteration, epoch), and meets each example once. A batch depends on
    its step alone, so that an interrupted iteration continues without any state of the sampler.

    With costs, a global batch is a stratified sample: examples are sorted by cost and cut into as many strata as a
    batch has places, and each step draws one of each stratum. Steps then take about the same time and pack alike, and
    which examples meet in one is still random.

    Args:
        num_examples: Number of triplets.
        global_batch_size: Triplets of a step; the last step of an epoch takes what is left.
        seed: Seed of the run.
        iteration: Self-play iteration.
        costs: Of each example, to balance batches; None shuffles.
    """

    def __init__(
        self,
        num_examples: int,
        global_batch_size: int,
        seed: int,
        iteration: int,
        costs: Sequence[float] | None = None,
    ) -> None:
        self._num_examples = num_examples
        self._global_batch_size = global_batch_size
        self._key = (seed, iteration)
        self._steps_per_epoch = steps_per_epoch(num_examples, global_batch_size)
        self._costs = None if costs is None else np.asarray(costs, dtype=np.float64)
        self._cached: tuple[int, NDArray[np.int64]] | None = None

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of an optimizer step, counted from 0 through all epochs of the iteration."""
        epoch, step_in_epoch = divmod(step, self._steps_per_epoch)
        start = step_in_epoch * self._global_batch_size
        indices: list[int] = self._order(epoch)[start : start + self._global_batch_size].tolist()
        return indices

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._cached is None or self._cached[0] != epoch:
            seed, iteration = self._key
            order = _random_order(self._num_examples, np.random.SeedSequence([seed, iteration, epoch]))
            self._cached = (epoch, order if self._costs is None else self._stratified(order, self._costs))
        return self._cached[1]

    def _stratified(self, shuffled: NDArray[np.int64], costs: NDArray[np.float64]) -> NDArray[np.int64]:
        """The epoch's order, batch after batch, each with one example of each stratum of cost."""
        places, steps = self._global_batch_size, self._steps_per_epoch
        in_last_step = self._num_examples - places * (steps - 1)
        by_cost = shuffled[np.argsort(costs[shuffled], kind="stable")]
        # The last step draws from some strata only, spread evenly over the costs; those have a member more.
        spread = np.arange(places + 1) * in_last_step // places
        ends = np.cumsum(steps - 1 + np.diff(spread))
        rank = np.argsort(shuffled)  # place of each example in the shuffled order
        batches: list[list[int]] = [[] for _ in range(steps)]
        for stratum in np.split(by_cost, ends[:-1]):
            for step, example in enumerate(sorted(stratum.tolist(), key=rank.__getitem__)):
                batches[step].append(example)
        return np.array([example for batch in batches for example in batch], dtype=np.int64)
