"""Metrics of an optimizer step: from sums over triplets to one JSON line, and TensorBoard beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger
from megatron_tspin.objective.forward import SUMMED
from megatron_tspin.objective.roles import ROLES
from megatron_tspin.records import StepMetrics, read_records
from megatron_tspin.storage import write_text

_log = get_logger(__name__)

_PAIR_METRICS = ("current_advantage", "current_margin", "active_share", "mean_slope", "identical_share")


def step_metrics(
    sums: Tensor, roles: tuple[str, ...], measured: dict[str, Any], diagnostics: bool = False
) -> StepMetrics:
    """Divides the sums by the number of triplets; what the method does not compute becomes None.

    Args:
        sums: float64 [len(SUMMED)], over the global batch.
        roles: The roles that were computed.
        measured: The other fields of `StepMetrics`.
        diagnostics: Whether the head measured entropy and top-1 agreement.
    """
    totals = dict(zip(SUMMED, sums.tolist(), strict=True))
    count = totals["num_triplets"]
    fields: dict[str, Any] = {"loss": totals["loss"] / count, "num_triplets": int(count)}
    for role in ROLES:
        for quantity in ("log_prob", "reward", "tokens"):
            name = f"{quantity}_{role}"
            fields[name] = totals[name] / count if role in roles else None
    for name in _PAIR_METRICS:
        fields[name] = totals[name] / count if "synthetic" in roles else None
    fields["historical_advantage"] = totals["historical_advantage"] / count if "proto" in roles else None
    for role in ROLES:
        for quantity in ("entropy", "top"):
            known = diagnostics and role in roles
            fields[f"{quantity}_{role}"] = totals[f"{quantity}_{role}"] / totals[f"tokens_{role}"] if known else None
    fields["tokens_per_second"] = totals["tokens"] / measured["seconds"]
    fields["packing_efficiency"] = totals["used"] / totals["places"]
    fields["prompt_share_saved"] = 1.0 - totals["prompt_places"] / totals["prompt_tokens"]
    return StepMetrics(**fields, **measured)


class MetricsWriter:
    """Appends a line a step; a writer that continues an iteration first drops the lines after its checkpoint.

    Args:
        path: `metrics.jsonl`.
        done: Steps that the checkpoint holds.
        tensorboard: Folder for TensorBoard events; None writes none.
    """

    def __init__(self, path: Path, done: int, tensorboard: Path | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(_lines_up_to(path, done)))
        self._stream = path.open("a", encoding="utf-8")
        self._events: Any = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(tensorboard), purge_step=done + 1)

    def write(self, metrics: StepMetrics) -> None:
        """Writes one step."""
        self._stream.write(metrics.line())
        self._stream.flush()
        if self._events is not None:
            for name, value in metrics.model_dump().items():
                if isinstance(value, float):
                    self._events.add_scalar(name, value, metrics.step)

    def write_start(self, values: Mapping[str, float]) -> None:
        """Shows what was measured before the first step in TensorBoard, at step 0; the file of steps has none of it."""
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, 0)

    def close(self) -> None:
        """Closes the files."""
        self._stream.close()
        if self._events is not None:
            self._events.close()


def _lines_up_to(path: Path, done: int) -> list[str]:
    """The lines of the first `done` steps, up to the first one that a power failure tore."""
    lines: list[str] = []
    if not path.is_file():
        return lines
    try:
        for record in read_records(path, StepMetrics):
            if record.step > done:
                break
            lines.append(record.line())
    except InputError as error:
        if len(lines) < done:  # a torn line of a later step is what a kill leaves behind
            _log.warning("%s; the metrics of steps %d to %d are lost", error, len(lines) + 1, done)
    return lines
