"""What a generation benchmark found."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tspin.benchmark.answers.settings import HEADLINE, OURS, TRANSFORMERS, AnswerSettings, Workload
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.models.sizes import attention_flops, head_flops, layer_flops


@dataclass(frozen=True)
class Measurement:
    """One engine's answers to a workload's prompts.

    Attributes:
        tokens: Of each answer.
        seconds: From the first prompt to the last answer.
        cpu_seconds: Of all threads; little of it, on a CPU, tells of others that took the cores.
        peak_mib: Peak memory above `held_mib`.
        held_mib: What the process held with the policy loaded.
    """

    tokens: list[int]
    seconds: float
    cpu_seconds: float
    peak_mib: float
    held_mib: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens, prompts' time included."""
        return sum(self.tokens) / self.seconds


@dataclass
class EngineResult:
    """An engine on a workload.

    Attributes:
        name: One of `settings.ENGINES`.
        measurements: One a round.
        absent: Why there are none, or no more.
        loading_seconds: Of the process until it could answer.
    """

    name: str
    measurements: list[Measurement] = field(default_factory=list)
    absent: str | None = None
    loading_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the rounds."""
        rates = [each.tokens_per_second for each in self.measurements]
        return statistics.median(rates) if rates else None


@dataclass
class AnswerResult:
    """All of it.

    Attributes:
        settings: What was measured.
        machine: `machine.describe_machine`.
        engines: By workload and engine.
        matmul_flops_per_second: Of 2048^3 in fp32 in each process before it answered.
    """

    settings: AnswerSettings
    machine: dict[str, Any]
    engines: dict[tuple[Workload, str], EngineResult] = field(default_factory=dict)
    matmul_flops_per_second: list[float] = field(default_factory=list)

    def engine(self, workload: Workload, name: str) -> EngineResult:
        """The engine's result, made if it is not there."""
        return self.engines.setdefault((workload, name), EngineResult(name))

    def speedup(self, workload: Workload, over: str) -> float | None:
        """Our tokens a second over another engine's, medians of the rounds."""
        found = [self.engines.get((workload, name)) for name in (OURS, over)]
        ours, other = (None if each is None else each.tokens_per_second for each in found)
        return None if ours is None or other is None else ours / other

    def headline(self) -> str | None:
        """The last line, if both sides of it were measured."""
        speedup = self.speedup(HEADLINE, TRANSFORMERS)
        return None if speedup is None else f"speedup over transformers.generate: {speedup:.2f}"

    def failures(self, names: Sequence[str]) -> list[str]:
        """Of these engines, what could not be measured and why, a line each."""
        return [
            f"{workload.name}, {name}: {engine.absent}"
            for (workload, name), engine in self.engines.items()
            if name in names and engine.absent is not None
        ]

    def share_of_matmul(self, workload: Workload, measurement: Measurement) -> float:
        """The operations that the answers need at least, a second, over the rate of matrix products."""
        needed = needed_flops(Path(self.settings.model), self.settings.prompts[: workload.prompts], measurement.tokens)
        return needed / measurement.seconds / max(self.matmul_flops_per_second)

    def as_json(self) -> dict[str, Any]:
        """For the file of results."""
        settings = dataclasses.asdict(self.settings)
        settings["model"] = Path(self.settings.model).name
        settings["prompts"] = [len(prompt) for prompt in self.settings.prompts]
        found = [
            {
                "workload": dataclasses.asdict(workload),
                "engine": name,
                "absent": engine.absent,
                "tokens_per_second": engine.tokens_per_second,
                "share_of_matmul": [self.share_of_matmul(workload, each) for each in engine.measurements],
                "measurements": [dataclasses.asdict(each) for each in engine.measurements],
            }
            for (workload, name), engine in self.engines.items()
        ]
        return {
            "settings": settings,
            "machine": self.machine,
            "matmul_flops_per_second": self.matmul_flops_per_second,
            "results": found,
            "headline": self.headline(),
        }


def needed_flops(model: Path, prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> float:
    """Operations that answers of so many tokens need, nothing computed twice.

    Each token but an answer's last goes through the layers once, each position that predicts one through the head.
    """
    architecture = read_architecture(model)
    layers, head, pair = layer_flops(architecture), head_flops(architecture), attention_flops(architecture)
    total = 0.0
    for prompt, count in zip(prompts, tokens, strict=True):
        length = len(prompt) + count - 1
        total += layers * length + head * count + pair * length * (length + 1) / 2
    return total
