"""Writes the metrics of optimizer steps: one JSON line a step, and TensorBoard beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger
from megatron_tspin.records import read_records
from megatron_tspin.step_metrics import StepMetrics
from megatron_tspin.storage import write_text

_log = get_logger(__name__)


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
