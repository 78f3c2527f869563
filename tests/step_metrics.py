"""The metrics of a step whose sums are known."""

from megatron_tspin.step_metrics import SUMMED, StepMetrics

MEASURED = {
    "iteration": 1, "step": 3, "learning_rate": 1e-6, "grad_norm": 0.5, "update_skipped": False, "seconds": 2.0,
}  # fmt: skip
SUMS = {name: 10.0 * number for number, name in enumerate(SUMMED, start=1)} | {"num_triplets": 4.0}
"""Four triplets; every other quantity sums to ten times its place."""


def mean(name: str) -> float:
    return SUMS[name] / 4


def metrics(step: int) -> StepMetrics:
    return StepMetrics.from_sums(SUMS, ("annotated", "synthetic"), {**MEASURED, "step": step})
