"""What a step benchmark measures: its sides, its data and its defaults."""

from dataclasses import dataclass
from pathlib import Path

from megatron_tspin.config import default_row_capacity
from megatron_tspin.errors import InputError
from megatron_tspin.models.hf_config import Architecture

TRANSFORMERS = "transformers"
TRANSFORMERS_MB1 = "transformers_mb1"
RECIPE = "recipe"
TRL = "trl"
PADDED = "padded"
UNSHARED = "unshared"
PACKED = "packed"

SIDES = {
    TRANSFORMERS: "plain transformers as in the Alignment Handbook: padded rows of all roles, full logits",
    TRANSFORMERS_MB1: "the same with one triplet a micro-batch, which pads least",
    RECIPE: "the same with gradient checkpointing and larger micro-batches, as the public recipes run it",
    TRL: "TRL's TPOTrainer: three responses a prompt, no reference model",
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

_LONGEST = 2048
_TRIPLETS = 16
_ROUNDS = 5
_QUICK_LONGEST = 384
_QUICK_TRIPLETS = 4
_QUICK_ROUNDS = 3
_MICRO_BATCH = 4
_QUICK_MICRO_BATCH = 2
_QUICK_MINUTES = 9.0
_QUICK_SIDES = (TRANSFORMERS, PADDED, UNSHARED, PACKED)


@dataclass(frozen=True)
class StepSettings:
    """One run of the step benchmark.

    Attributes:
        model: HF folder of the policy.
        sides: Names out of `SIDES`, in its order.
        lengths: Name of the length distribution (`benchmark.lengths`).
        max_length: Most tokens of a prompt and a response together.
        triplets: Triplets of the global batch.
        micro_batch_size: Triplets in a padded micro-batch.
        recipe_micro_batch_size: The same of the side with gradient checkpointing.
        row_capacity: Tokens of a packed row.
        rounds: Timed repetitions of each side; after each one the next side has its turn.
        threads: CPU threads of a side.
        bf16: Compute in bfloat16 instead of fp32.
        seed: Of lengths and token ids.
        trl_path: Folder with TRL and what it needs, if the environment has none.
        minutes: No round starts that would end later than this after the start; None sets no limit.
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
    trl_path: str | None = None
    minutes: float | None = None
    recipe_micro_batch_size: int = RECIPE_MICRO_BATCH

    def micro_batch_of(self, side: str) -> int:
        """Triplets in a padded micro-batch of a side."""
        return {TRANSFORMERS_MB1: 1, RECIPE: self.recipe_micro_batch_size}.get(side, self.micro_batch_size)


@dataclass(frozen=True)
class Wishes:
    """What the command line says; None is left to the defaults, which are smaller for a quick run."""

    quick: bool = False
    sides: tuple[str, ...] | None = None
    max_length: int | None = None
    triplets: int | None = None
    micro_batch_size: int | None = None
    recipe_micro_batch_size: int | None = None
    row_capacity: int | None = None
    rounds: int | None = None
    minutes: float | None = None


def settle(
    wishes: Wishes,
    architecture: Architecture,
    lengths: str,
    threads: int,
    bf16: bool,
    seed: int,
    trl_path: Path | None,
) -> StepSettings:
    """Fills in the defaults. That of the row capacity is the config's own, which holds any triplet.

    Raises:
        InputError: The longest sequence does not fit into the policy's positions.
    """
    quick, positions = wishes.quick, architecture.max_positions
    longest = wishes.max_length or min(_QUICK_LONGEST if quick else _LONGEST, positions)
    if longest > positions:
        raise InputError(f"--max-length {longest} is more than the {positions} positions of {architecture.folder}")
    chosen = wishes.sides or (_QUICK_SIDES if quick else tuple(SIDES))
    micro_batch_size = wishes.micro_batch_size or (_QUICK_MICRO_BATCH if quick else _MICRO_BATCH)
    return StepSettings(
        model=str(architecture.folder),
        sides=tuple(side for side in SIDES if side in chosen),
        lengths=lengths,
        max_length=longest,
        triplets=wishes.triplets or (_QUICK_TRIPLETS if quick else _TRIPLETS),
        micro_batch_size=micro_batch_size,
        row_capacity=wishes.row_capacity or default_row_capacity(micro_batch_size, longest),
        rounds=wishes.rounds or (_QUICK_ROUNDS if quick else _ROUNDS),
        threads=threads,
        bf16=bf16,
        seed=seed,
        trl_path=None if trl_path is None else str(trl_path),
        recipe_micro_batch_size=wishes.recipe_micro_batch_size or RECIPE_MICRO_BATCH,
        minutes=wishes.minutes or (_QUICK_MINUTES if quick else None),
    )
