"""What an iteration benchmark found: table, JSON and last line."""

import dataclasses
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tspin.benchmark.answers.settings import OURS, TRANSFORMERS
from megatron_tspin.benchmark.iteration.settings import SIDES, STAGES, IterationSettings
from megatron_tspin.benchmark.tables import make_table, show
from megatron_tspin.storage import write_json

_COLUMNS = ("stage", "side", "seconds", "min..max", "tokens", "speedup", "peak MiB")
_MEANINGS = """\
rollout: all prompts answered, from the first one to the last answer; training: one epoch over triplets of the same
prompts, optimizer included; neither loads or writes a checkpoint. tokens: of the answers, and of prompts and responses
trained on; peak MiB: of the process"""


@dataclass(frozen=True)
class StageMeasurement:
    """One stage of one side, once.

    Attributes:
        seconds: On the clock.
        cpu_seconds: Of all threads.
        peak_mib: Of the whole process.
        tokens: See `_MEANINGS`.
    """

    seconds: float
    cpu_seconds: float
    peak_mib: float
    tokens: int


@dataclass
class IterationResult:
    """All of it; measurements by side and stage, one a round."""

    settings: IterationSettings
    machine: dict[str, Any]
    measurements: dict[tuple[str, str], list[StageMeasurement]] = field(default_factory=lambda: defaultdict(list))
    matmul_flops_per_second: list[float] = field(default_factory=list)

    def seconds(self, side: str, stage: str) -> float:
        """Median over the rounds."""
        return statistics.median(each.seconds for each in self.measurements[side, stage])

    def speedup(self, *stages: str) -> float:
        """Transformers' seconds over ours, of these stages together."""
        theirs, ours = (sum(self.seconds(side, stage) for stage in stages) for side in (TRANSFORMERS, OURS))
        return theirs / ours

    def headline(self) -> str:
        """The last line."""
        return f"speedup of an iteration: {self.speedup(*STAGES):.2f}"

    def as_json(self) -> dict[str, Any]:
        """For the file of results; of the prompts and responses it has the lengths."""
        settings = dataclasses.asdict(self.settings)
        settings |= {name: list(map(len, settings[name])) for name in ("prompts", "responses")}
        return {
            "settings": settings | {"model": Path(self.settings.model).name},
            "machine": self.machine,
            "matmul_flops_per_second": self.matmul_flops_per_second,
            "results": [
                {"side": side, "stage": stage, "measurements": [dataclasses.asdict(each) for each in found]}
                for (side, stage), found in self.measurements.items()
            ],
            "headline": self.headline(),
        }

    def write(self, folder: Path) -> Path:
        """Writes the JSON file."""
        target = folder / f"iteration_{Path(self.settings.model).name}.json"
        write_json(target, self.as_json())
        return target

    def show(self) -> None:
        """Prints the table and the last line."""
        settings, machine = self.settings, self.machine
        title = (
            f"An iteration of {Path(settings.model).name} in fp32 over {len(settings.prompts)} prompts: up to "
            f"{settings.new_tokens} new tokens, {len(settings.global_batches())} optimizer steps\n"
            f"{machine['cpu']}, {settings.threads} threads of {machine['cores']} cores, matrix products "
            f"{max(self.matmul_flops_per_second) / 1e9:.0f} GFLOP/s"
        )
        rows = [self._row(side, stage) for stage in STAGES for side in SIDES]
        show(title, _MEANINGS, make_table(_COLUMNS, rows), self.headline())

    def _row(self, side: str, stage: str) -> list[str]:
        found = self.measurements[side, stage]
        seconds = sorted(each.seconds for each in found)
        return [
            stage,
            side,
            f"{self.seconds(side, stage):.1f}",
            f"{seconds[0]:.1f}..{seconds[-1]:.1f}",
            f"{statistics.median(each.tokens for each in found):.0f}",
            f"{self.speedup(stage):.2f}" if side == OURS else "1.00",
            f"{max(each.peak_mib for each in found):.0f}",
        ]
