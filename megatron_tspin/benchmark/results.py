"""What a step benchmark found, the numbers drawn from it, and its JSON file."""

import dataclasses
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_tspin.benchmark.settings import BASELINE, PACKED, StepSettings
from megatron_tspin.errors import ArtifactError
from megatron_tspin.storage import read_json


@dataclass
class SideResult:
    """One side.

    Attributes:
        name: One of `settings.SIDES`.
        predicted_flops: See `work.predicted_flops`.
        absent: Why there are no measurements; None where there are.
        held_mib: Memory held before the first step: weights, gradients, libraries.
        versions: Of the packages that computed.
        warm_up_seconds: Of the first, untimed repetition.
        sums: Loss and log-probs of the batch.
        seconds: Of each timed repetition, in order.
        cpu_seconds: Of all threads, likewise; little of it, on a CPU, tells of others that took the cores.
        peak_mib: Peak memory of each repetition above `held_mib`, the untimed one first.
    """

    name: str
    predicted_flops: float
    absent: str | None = None
    held_mib: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    warm_up_seconds: float | None = None
    sums: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Rate:
    """A rate over the repetitions: median, lowest and highest."""

    median: float
    low: float
    high: float


@dataclass
class StepResult:
    """A run of the step benchmark.

    Attributes:
        settings: What was run.
        date: When it started, local time with offset.
        machine: See `machine.describe_machine`.
        memory_method: How peak memory was measured.
        prompt_tokens: Of each triplet.
        response_tokens: Of each triplet, by role in the order of `ROLES`.
        useful_flops: See `work.useful_flops`.
        matmul_flops_per_second: Best rate of a matrix product before the first and after the last round.
        sides: In the order of a round.
    """

    settings: StepSettings
    date: str
    machine: dict[str, Any]
    memory_method: str
    prompt_tokens: list[int]
    response_tokens: list[list[int]]
    useful_flops: float
    matmul_flops_per_second: list[float]
    sides: list[SideResult]

    def side(self, name: str) -> SideResult | None:
        """A side that was measured; None otherwise."""
        return next((side for side in self.sides if side.name == name and side.seconds), None)

    def triplets_per_second(self, side: SideResult) -> Rate:
        """Over the timed repetitions, of which there is at least one."""
        rates = [self.settings.triplets / seconds for seconds in side.seconds]
        return Rate(statistics.median(rates), min(rates), max(rates))

    def response_tokens_per_second(self, side: SideResult) -> float:
        """Median over the timed repetitions."""
        tokens = sum(map(sum, self.response_tokens))
        return statistics.median(tokens / seconds for seconds in side.seconds)

    def speedup(self, side: SideResult) -> float | None:
        """Median triplets/s over those of plain transformers."""
        baseline = self.side(BASELINE)
        if baseline is None:
            return None
        return self.triplets_per_second(side).median / self.triplets_per_second(baseline).median

    def predicted_speedup(self, side: SideResult) -> float | None:
        """What the operations alone say."""
        baseline = next((other for other in self.sides if other.name == BASELINE), None)
        return None if baseline is None else baseline.predicted_flops / side.predicted_flops

    def useful_share_of_peak(self, side: SideResult) -> float:
        """Useful operations per second over the best rate of a matrix product."""
        return self.useful_flops / statistics.median(side.seconds) / max(self.matmul_flops_per_second)

    def headline(self) -> str | None:
        """The last line that the benchmark prints; None unless both sides were measured."""
        packed = self.side(PACKED)
        speedup = None if packed is None else self.speedup(packed)
        return None if speedup is None else f"speedup over transformers: {speedup:.2f}"

    def as_json(self) -> dict[str, Any]:
        """Every repetition, and the numbers of the table. The folder of the model is cut to its name."""
        tree = dataclasses.asdict(self)
        tree["settings"]["model"] = Path(self.settings.model).name
        tree["includes_optimizer"] = False
        for side, known in zip(tree["sides"], self.sides, strict=True):
            if known.seconds:
                side["triplets_per_second"] = dataclasses.asdict(self.triplets_per_second(known))
                side["response_tokens_per_second"] = self.response_tokens_per_second(known)
                side["speedup"] = self.speedup(known)
                side["useful_share_of_peak"] = self.useful_share_of_peak(known)
            side["predicted_speedup"] = self.predicted_speedup(known)
        return {"benchmark": "triplet_step", **tree}


def read_result(path: Path) -> StepResult:
    """Reads the JSON file of a step benchmark, also of an earlier version.

    Raises:
        InputError: The file is missing.
        ArtifactError: It is not such a file.
    """
    tree = read_json(path)
    if not isinstance(tree, dict) or tree.get("benchmark") != "triplet_step":
        raise ArtifactError(f"{path}: not a result of `tspin bench step`")
    try:
        return TypeAdapter(StepResult).validate_python(tree)
    except ValidationError as error:
        raise ArtifactError(f"{path}: not a result of `tspin bench step`: {error}") from error
