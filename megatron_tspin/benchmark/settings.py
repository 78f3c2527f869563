"""What a step benchmark measures: its sides, its data and its defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tspin.config import default_row_capacity
from megatron_tspin.errors import InputError
from megatron_tspin.models.architecture import Architecture

TRANSFORMERS = "transformers"
TRANSFORMERS_MB1 = "transformers_mb1"
RECIPE = "recipe"
PADDED = "padded"
UNSHARED = "unshared"
PACKED = "packed"

SIDES = {
    TRANSFORMERS: "plain transformers as in the Alignment Handbook: padded rows of all roles, full logits",
    TRANSFORMERS_MB1: "the same with one triplet a micro-batch, which pads least",
    RECIPE: "the same with gradient checkpointing and larger micro-batches, as the public recipes run it",
    PADDED: "ours, one padded row a response",
    UNSHARED: "ours, packed rows, each response with a prompt of its own",
    PACKED: "ours, packed rows, one prompt for all responses of a triplet",
}
"""The sides in the order in which a round runs them, and what each is."""

OWN_SIDES = (PADDED, UNSHARED, PACKED)
BASELINE = TRANSFORMERS

ALPHA = 0.001
"""Scale of the advantages. Random tokens have log-probs of thousands of nats; a scale of 1 would leave every triplet a
slope of 0 or 1, and numbers too small to be normal slow a CPU down."""
BETA = 0.1
"""Weight of the historical advantage, so that all three responses are computed."""

RECIPE_MICRO_BATCH = 8
"""Of alignment-handbook's recipes/zephyr-7b-beta/dpo/config_full.yaml and of uclaml/SPIN's configs/config.yaml, which
both set `gradient_checkpointing: true` and `max_length: 1024`."""

_FULL: dict[str, Any] = {
    "sides": tuple(SIDES),
    "max_length": 2048,
    "triplets": 16,
    "micro_batch_size": 4,
    "rounds": 5,
}
_QUICK: dict[str, Any] = {
    "sides": (TRANSFORMERS, PADDED, UNSHARED, PACKED),
    "max_length": 384,
    "triplets": 4,
    "micro_batch_size": 2,
    "rounds": 3,
    "minutes": 9.0,
}


@dataclass(frozen=True)
class StepSettings:
    """One run of the step benchmark.

    Attributes:
        model: HF folder of the policy.
        sides: Names out of `SIDES`, in its order, and others' behind them.
        lengths: Name of the length distribution (`benchmark.lengths`).
        max_length: Most tokens of a prompt and a response together.
        triplets: Triplets of the global batch.
        micro_batch_size: Triplets in a padded micro-batch.
        row_capacity: Tokens of a packed row.
        rounds: Timed repetitions of each side; after each one the next side has its turn.
        threads: CPU threads of a side.
        bf16: Compute in bfloat16 instead of fp32.
        seed: Of lengths and token ids.
        minutes: No round starts that would end later than this after the start; None sets no limit.
        recipe_micro_batch_size: `micro_batch_size` of the side with gradient checkpointing.
    """

    model: str
    sides: tuple[str, ...]
    lengths: str
    max_length: int
    triplets: int
    micro_batch_size: int
    row_capacity: int
    rounds: int
    threads: int
    bf16: bool = False
    seed: int = 0
    minutes: float | None = None
    recipe_micro_batch_size: int = RECIPE_MICRO_BATCH

    def micro_batch_of(self, side: str) -> int:
        """Triplets in a padded micro-batch of a side."""
        return {TRANSFORMERS_MB1: 1, RECIPE: self.recipe_micro_batch_size}.get(side, self.micro_batch_size)


def settle(given: Mapping[str, Any], quick: bool, architecture: Architecture) -> StepSettings:
    """Fills in the defaults. That of the row capacity is the config's own, which holds any triplet.

    Args:
        given: Fields of `StepSettings`; those that are None, and the absent ones, get their defaults.
        quick: Smaller defaults.
        architecture: Of the policy.

    Raises:
        InputError: The longest sequence does not fit into the policy's positions.
    """
    positions = architecture.max_positions
    chosen = {**(_QUICK if quick else _FULL), **{name: value for name, value in given.items() if value is not None}}
    if given.get("max_length") is None:
        chosen["max_length"] = min(chosen["max_length"], positions)
    if chosen["max_length"] > positions:
        raise InputError(
            f"--max-length {chosen['max_length']} is more than the {positions} positions of {architecture.folder}"
        )
    chosen.setdefault("row_capacity", default_row_capacity(chosen["micro_batch_size"], chosen["max_length"]))
    chosen["sides"] = tuple(sorted(chosen["sides"], key=[*SIDES, *chosen["sides"]].index))
    return StepSettings(model=str(architecture.folder), **chosen)
