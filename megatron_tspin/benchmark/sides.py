"""The interface of a side, and where the sides are.

A side computes loss and gradients of one global batch of triplets: forward and backward over all of it, without the
optimizer. Loading happens when it is made.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Protocol

from megatron_tspin.benchmark.lengths import TokenTriplet
from megatron_tspin.benchmark.settings import OWN_SIDES, RECIPE, TRL, StepSettings
from megatron_tspin.errors import TspinError

LOSS = "loss"


class AbsentError(TspinError):
    """What a side needs is not installed."""


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


def make_side(name: str, settings: StepSettings, batch: Sequence[TokenTriplet]) -> Side:
    """Loads a side.

    Raises:
        AbsentError: A package that it needs is not installed.
    """
    if name in OWN_SIDES:
        from megatron_tspin.benchmark.own_side import OwnSide

        return OwnSide(name, settings, batch)
    if name == TRL:
        if settings.trl_path is not None:
            # Last, so that torch and transformers stay those of the other sides; and before transformers is imported,
            # which looks for accelerate only then.
            sys.path.append(settings.trl_path)
        if find_spec("trl") is None:
            raise AbsentError("TRL is not installed; pip install trl, or name its folder with --trl-path")
        from megatron_tspin.benchmark.trl_side import TrlSide

        return TrlSide(settings, batch)
    from megatron_tspin.benchmark.transformers_side import TransformersSide

    return TransformersSide(settings, batch, settings.micro_batch_of(name), checkpointing=name == RECIPE)
