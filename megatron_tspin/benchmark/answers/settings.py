"""What a generation benchmark measures."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tspin.data.endings import ids_of_configs
from megatron_tspin.models.architecture import Architecture

OURS = "ours"
TRANSFORMERS = "transformers"
CONTINUOUS = "transformers_continuous"

ENGINES = {
    OURS: "our engine: continuous batching over a key-value cache of blocks",
    TRANSFORMERS: "transformers' generate over batches padded on the left, in the order of the prompts",
    CONTINUOUS: "transformers' continuous batching, generate_batch",
}
"""The engines in the order in which a round runs them, and what each is."""

_PROMPT_TOKENS = (60, 190)
"""Of random prompts, where none are given: about as long as grade-school questions in a chat template."""
PROMPTS = 64
"""Answered, but at a batch of 1."""
_PROMPTS_AT_BATCH_1 = 6


@dataclass(frozen=True)
class Workload:
    """One thing to measure.

    Attributes:
        batch: Answers at once.
        prompts: How many are answered.
        ends: Answers end at the checkpoint's EOS tokens; otherwise all are as long as they may be.
    """

    batch: int
    prompts: int
    ends: bool

    @property
    def name(self) -> str:
        """For tables."""
        return f"batch {self.batch}, {'ending at EOS' if self.ends else 'all of one length'}"


@dataclass(frozen=True)
class AnswerSettings:
    """One run of the generation benchmark.

    Attributes:
        model: HF folder of the policy.
        prompts: Token ids of each prompt.
        workloads: In the order in which they are measured.
        engines: Names out of `ENGINES`, in its order.
        new_tokens: Most tokens of an answer.
        rounds: Measurements of each engine; after each one the next engine has its turn.
        threads: CPU threads of an engine.
        minutes: No measurement starts that would end later than this after the start, but the first of each engine;
            None sets no limit.
        seed: Of the sampling.
    """

    model: str
    prompts: Sequence[Sequence[int]]
    workloads: tuple[Workload, ...]
    engines: tuple[str, ...]
    new_tokens: int
    rounds: int
    threads: int
    minutes: float | None = None
    seed: int = 0

    @property
    def stops(self) -> list[int]:
        """The checkpoint's EOS tokens."""
        return ids_of_configs(Path(self.model))


HEADLINE = Workload(64, PROMPTS, ends=True)


def workloads(quick: bool) -> tuple[Workload, ...]:
    """The headline's alone, or all."""
    if quick:
        return (HEADLINE,)
    sizes = ((1, _PROMPTS_AT_BATCH_1), (16, PROMPTS), (64, PROMPTS))
    return tuple(Workload(batch, prompts, ends) for ends in (True, False) for batch, prompts in sizes)


def random_prompts(architecture: Architecture, seed: int) -> list[list[int]]:
    """Prompts of random tokens."""
    chance = random.Random(seed)
    lengths = [chance.randint(*_PROMPT_TOKENS) for _ in range(PROMPTS)]
    return [[chance.randrange(architecture.vocab_size) for _ in range(length)] for length in lengths]
