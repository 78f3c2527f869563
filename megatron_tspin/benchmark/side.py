"""The interface of a side.

A side computes loss and gradients of one global batch of triplets: forward and backward over all of it, without the
optimizer. Loading happens when it is made.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_tspin.benchmark.lengths import TokenTriplet
from megatron_tspin.benchmark.settings import StepSettings

LOSS = "loss"


class Side(Protocol):
    """One way to compute a step."""

    def zero_gradients(self) -> None:
        """Fills the gradients with zeros, which also makes sure that their memory is there; not timed."""

    def forward_backward(self) -> dict[str, float]:
        """The timed part.

        Returns:
            Sums over the triplets of the global batch: `loss`, and `log_prob_<role>` of each role, as far as the side
            knows them.
        """

    def versions(self) -> dict[str, str]:
        """Versions of the packages that compute."""


SideMaker = Callable[[str, StepSettings, Sequence[TokenTriplet]], Side]
"""Loads the side of a name; importable, as it is called in another process. Raises what goes wrong."""
