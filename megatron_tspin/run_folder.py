"""Where everything of a run is. Every stage, the driver and the report take their paths from here."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run. Policy number t is the one after t self-play iterations; number 0 is the initial policy."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.root / "run.yaml"

    @property
    def data(self) -> Path:
        """Examples, and the documents written once."""
        return self.root / "data"

    @property
    def proto(self) -> Path:
        """Shards of the initial policy's answers (y0)."""
        return self.root / "proto"

    @property
    def export(self) -> Path:
        """The final policy as an HF checkpoint."""
        return self.root / "export" / "hf"

    @property
    def report(self) -> Path:
        """The report."""
        return self.root / "report.html"

    def iteration(self, iteration: int) -> Path:
        """Folder of a self-play iteration."""
        return self.root / f"iteration_{iteration:03d}"

    def synthetic(self, iteration: int) -> Path:
        """Shards of the answers that an iteration trains against (y')."""
        return self.iteration(iteration) / "synthetic"

    def metrics(self, iteration: int) -> Path:
        """One JSON line an optimizer step."""
        return self.iteration(iteration) / "metrics.jsonl"

    def reference(self, iteration: int) -> Path:
        """Reference log-probs of the methods that have a reference."""
        return self.iteration(iteration) / "reference.jsonl"

    def precision(self, iteration: int) -> Path:
        """What bf16 or FP8 does to log-probs at the start of an iteration."""
        return self.iteration(iteration) / "precision.json"

    def checkpoints(self, iteration: int) -> Path:
        """Folder of an iteration's checkpoints, `step_00000012` and so on; the last one is policy iteration + 1."""
        return self.iteration(iteration) / "checkpoint"

    @property
    def initial_checkpoint(self) -> Path:
        """The converted initial policy."""
        return self.root / "initial" / "checkpoint"

    def evaluation(self, policy: int) -> Path:
        """Held-out results of a policy."""
        return self.root / "evaluation" / f"policy_{policy:03d}.json"

    def evaluation_answers(self, policy: int, decoding: str) -> Path:
        """Shards of a policy's held-out answers; `decoding` is `greedy` or `sampled`."""
        return self.root / "evaluation" / f"policy_{policy:03d}" / decoding
