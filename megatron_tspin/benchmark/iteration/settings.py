"""What an iteration benchmark runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tspin.benchmark.answers.settings import OURS, AnswerSettings, Workload
from megatron_tspin.benchmark.lengths import TokenTriplet
from megatron_tspin.benchmark.settings import PACKED, TRANSFORMERS, StepSettings
from megatron_tspin.config import default_row_capacity
from megatron_tspin.objective.roles import ROLES

SIDES = (OURS, TRANSFORMERS)
ROLLOUT, TRAINING = "rollout", "training"
STAGES = (ROLLOUT, TRAINING)


@dataclass(frozen=True)
class IterationSettings:
    """One run of the iteration benchmark.

    Attributes:
        model: HF folder of the policy.
        prompts: Token ids of each prompt; all are answered.
        responses: Annotated token ids of each prompt.
        new_tokens: Most tokens of an answer.
        batch: Answers at once.
        global_batch_size: Triplets of an optimizer step.
        micro_batch_size: Triplets of a padded micro-batch.
        rounds: Measurements of each side; after each one the other side has its turn.
        threads: CPU threads of a side.
        seed: Of the sampling.
    """

    model: str
    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    new_tokens: int = 128
    batch: int = 64
    global_batch_size: int = 16
    micro_batch_size: int = 4
    rounds: int = 1
    threads: int = 1
    seed: int = 0

    def triplets(self) -> list[TokenTriplet]:
        """What both sides train on, whatever they sampled: y' and y0 are annotated responses to other prompts."""
        count = len(self.prompts)
        return [
            TokenTriplet(list(prompt), tuple(list(self.responses[(i + shift) % count]) for shift in range(len(ROLES))))
            for i, prompt in enumerate(self.prompts)
        ]

    def global_batches(self) -> list[list[TokenTriplet]]:
        """The triplets of each optimizer step; each is in one."""
        triplets, size = self.triplets(), self.global_batch_size
        return [triplets[start : start + size] for start in range(0, len(triplets), size)]

    def rollout(self) -> tuple[AnswerSettings, Workload]:
        """The rollout as `benchmark.answers` runs it."""
        workload = Workload(self.batch, len(self.prompts), ends=True)
        settings = AnswerSettings(
            self.model, self.prompts, (workload,), (), self.new_tokens, self.rounds, self.threads, seed=self.seed
        )
        return settings, workload

    def step(self) -> StepSettings:
        """A step as `benchmark.step` runs it."""
        longest = max(len(each.prompt) + max(map(len, each.responses)) for each in self.triplets())
        return StepSettings(
            model=self.model,
            sides=(TRANSFORMERS, PACKED),
            lengths="as given",
            max_length=longest,
            triplets=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            row_capacity=default_row_capacity(self.micro_batch_size, longest),
            rounds=self.rounds,
            threads=self.threads,
        )
