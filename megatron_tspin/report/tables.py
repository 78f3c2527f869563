"""The table per iteration: one source for the report and for the terminal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_tspin.records import DecodingResult, Evaluation, MarginNoise, PrecisionNoise, RolloutSummary
from megatron_tspin.report.run_data import Iteration, RunData, weighted_mean
from megatron_tspin.report.warnings import MIN_ACTIVE_SHARE, find_warnings
from megatron_tspin.step_metrics import StepMetrics

ABSENT = "–"
_LABEL_WIDTH, _COLUMN_WIDTH = 40, 13  # of the terminal's table


@dataclass(frozen=True)
class IterationRow:
    """One iteration: its training, the answers it trained on, and the policy that came out.

    The table shows numbers of the policy as means over the second half of the steps, where the iteration has arrived,
    and numbers of the data as means over all of them. Log-probs are sums over the tokens of a response, in nats.
    """

    iteration: int | None
    """None is the start: the initial policy, no training."""
    steps: int = 0
    skipped: int = 0
    early: Mapping[str, float | None] = field(default_factory=dict)
    """Mean of each metric of `StepMetrics` over the first half of the steps; the start has none."""
    late: Mapping[str, float | None] = field(default_factory=dict)
    """Over the second half."""
    whole: Mapping[str, float | None] = field(default_factory=dict)
    """Over all of them."""
    historical_margin: float | None = None
    """Of the second half."""
    rollout: RolloutSummary | None = None
    """The answers y' to the training prompts; of the start: y0."""
    precision: PrecisionNoise | None = None
    """What low precision did to log-probs before the first step."""
    evaluation: Evaluation | None = None
    """The policy after the iteration, on held-out prompts."""

    @property
    def label(self) -> str:
        """Heading of its column."""
        return "start" if self.iteration is None else f"iter {self.iteration}"


@dataclass(frozen=True)
class Measure:
    """One line of the table."""

    group: str
    label: str
    text: Callable[[IterationRow], str]
    """Formatted value, ABSENT if there is none."""


def iteration_rows(run: RunData) -> list[IterationRow]:
    """The start and every iteration that has begun, in order."""
    start = IterationRow(None, rollout=run.proto, evaluation=run.evaluations.get(0))
    return [start, *(_row(run, iteration) for iteration in run.iterations)]


def measures_with_values(rows: Sequence[IterationRow]) -> list[Measure]:
    """The lines of the table that have a value in any column."""
    return [measure for measure in MEASURES if any(measure.text(row) != ABSENT for row in rows)]


def render_terminal(run: RunData, console: Console) -> None:
    """Prints the table per iteration and the warnings; the start and the latest iterations if not all fit."""
    rows = iteration_rows(run)
    room = max(2, (console.width - _LABEL_WIDTH) // _COLUMN_WIDTH)
    shown = rows if len(rows) <= room else [rows[0], *rows[1 - room :]]
    method = run.config.objective.method
    title = Text(method if run.name == method else f"{run.name} ({method})", style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for row in shown:
        table.add_column(row.label, justify="right", no_wrap=True)
    for group, measures in groupby(measures_with_values(shown), key=lambda measure: measure.group):
        table.add_section()
        table.add_row(Text(group, style="bold"))
        for measure in measures:
            table.add_row(Text(f"  {measure.label}"), *(Text(measure.text(row)) for row in shown))
    console.print(table)
    for warning in find_warnings(run):
        console.print(Text(f"Warning: {warning.title}. {warning.measured} Try: {warning.remedy}", style="yellow"))
    for problem in run.problems:
        console.print(Text(f"Unreadable: {problem}", style="yellow"))


def _row(run: RunData, iteration: Iteration) -> IterationRow:
    late = _means(iteration.late)
    historical = late["historical_advantage"]
    return IterationRow(
        iteration=iteration.index,
        steps=len(iteration.steps),
        skipped=sum(step.update_skipped for step in iteration.steps),
        early=_means(iteration.early),
        late=late,
        whole=_means(iteration.steps),
        historical_margin=None if historical is None else run.config.objective.alpha * historical,
        rollout=iteration.synthetic,
        precision=iteration.precision,
        evaluation=run.evaluations.get(iteration.index + 1),
    )


def _means(steps: Sequence[StepMetrics]) -> dict[str, float | None]:
    return {name: weighted_mean(steps, name) for name in StepMetrics.model_fields}


def number(value: float | None, digits: int = 1) -> str:
    """Fixed decimals with a real minus sign, ABSENT for None."""
    return ABSENT if value is None else f"{value:,.{digits}f}".replace("-", "−")


def percent(share: float | None, digits: int = 0) -> str:
    """A share as a percentage, ABSENT for None."""
    return ABSENT if share is None else f"{number(100 * share, digits)}\u00a0%"


def accuracy(result: DecodingResult | None) -> str:
    """Accuracy in percent with its standard error, without the percent sign."""
    if result is None or result.accuracy is None:
        return ABSENT
    error = "" if result.standard_error is None else f"\u00a0±\u00a0{100 * result.standard_error:.1f}"
    return f"{100 * result.accuracy:.1f}{error}"


def _active(row: IterationRow) -> str:
    share = row.late.get("active_share")
    low = share is not None and share < MIN_ACTIVE_SHARE
    return percent(share) + (" !" if low else "")


def _skipped(row: IterationRow) -> str:
    return f"{row.skipped} of {row.steps}" if row.steps else ABSENT


def _rollout(field: str) -> Callable[[IterationRow], str]:
    return lambda row: ABSENT if row.rollout is None else percent(getattr(row.rollout, field))


def _evaluation(field: str, digits: int) -> Callable[[IterationRow], str]:
    return lambda row: ABSENT if row.evaluation is None else number(getattr(row.evaluation, field), digits)


def _decoding(decoding: str, form: Callable[[DecodingResult | None], str]) -> Callable[[IterationRow], str]:
    return lambda row: form(None if row.evaluation is None else getattr(row.evaluation, decoding))


def _ended(result: DecodingResult | None) -> str:
    return ABSENT if result is None else percent(result.ended_share)


def _length(result: DecodingResult | None) -> str:
    return ABSENT if result is None else number(result.mean_tokens)


def _late(metric: str, form: Callable[[float | None], str] = number) -> Callable[[IterationRow], str]:
    assert metric in StepMetrics.model_fields, metric
    return lambda row: form(row.late.get(metric))


def _whole(metric: str, form: Callable[[float | None], str] = number) -> Callable[[IterationRow], str]:
    assert metric in StepMetrics.model_fields, metric
    return lambda row: form(row.whole.get(metric))


def _digits(digits: int) -> Callable[[float | None], str]:
    return lambda value: number(value, digits)


def _precision(digits: int, value: Callable[[PrecisionNoise], float | None]) -> Callable[[IterationRow], str]:
    return lambda row: ABSENT if row.precision is None else number(value(row.precision), digits)


def _precision_share(value: Callable[[PrecisionNoise], float | None]) -> Callable[[IterationRow], str]:
    return lambda row: ABSENT if row.precision is None else percent(value(row.precision), 1)


def _noise_share(margin: MarginNoise | None) -> float | None:
    return None if margin is None else margin.noise_share


_HELD_OUT = "Held-out, policy after the iteration"
_TRAINING = "Training, second half of the steps"
_ANSWERS = "Answers to training prompts"
_PRECISION = "Precision, before the first step: as trained against fp32"
_COST = "Cost"

MEASURES: tuple[Measure, ...] = (
    Measure(_HELD_OUT, "accuracy (%), sampled", _decoding("sampled", accuracy)),
    Measure(_HELD_OUT, "accuracy (%), greedy", _decoding("greedy", accuracy)),
    Measure(_HELD_OUT, "NLL per token of y", _evaluation("nll_per_token", 4)),
    Measure(_HELD_OUT, "log-prob of y", _evaluation("log_prob_annotated", 1)),
    Measure(_HELD_OUT, "log-prob of fresh answers", _evaluation("log_prob_sampled", 1)),
    Measure(_HELD_OUT, "answers that end, sampled", _decoding("sampled", _ended)),
    Measure(_HELD_OUT, "answers that end, greedy", _decoding("greedy", _ended)),
    Measure(_HELD_OUT, "tokens, sampled", _decoding("sampled", _length)),
    Measure(_TRAINING, "log-prob of y (annotated)", _late("log_prob_annotated")),
    Measure(_TRAINING, "log-prob of y' (synthetic)", _late("log_prob_synthetic")),
    Measure(_TRAINING, "log-prob of y0 (proto)", _late("log_prob_proto")),
    Measure(_TRAINING, "reward of y", _late("reward_annotated", _digits(2))),
    Measure(_TRAINING, "reward of y'", _late("reward_synthetic", _digits(2))),
    Measure(_TRAINING, "current advantage", _late("current_advantage")),
    Measure(_TRAINING, "historical advantage", _late("historical_advantage")),
    Measure(_TRAINING, "current margin (scaled)", _late("current_margin", _digits(2))),
    Measure(_TRAINING, "historical margin (scaled)", lambda row: number(row.historical_margin, 2)),
    Measure(_TRAINING, "active pairs", _active),
    Measure(_TRAINING, "entropy at y (nats per token)", _late("entropy_annotated", _digits(2))),
    Measure(_TRAINING, "entropy at y'", _late("entropy_synthetic", _digits(2))),
    Measure(_TRAINING, "tokens of y that are the most probable", _late("top_annotated", percent)),
    Measure(_TRAINING, "tokens of y' that are the most probable", _late("top_synthetic", percent)),
    Measure(_TRAINING, "loss", _late("loss", _digits(3))),
    Measure(_TRAINING, "loss, first half of the steps", lambda row: number(row.early.get("loss"), 3)),
    Measure(_ANSWERS, "answers that end (start: y0)", _rollout("ended_share")),
    Measure(_ANSWERS, "answers that are empty", _rollout("empty_share")),
    Measure(_ANSWERS, "y' = y", _whole("identical_share", percent)),
    Measure(_ANSWERS, "tokens of y (annotated)", _whole("tokens_annotated")),
    Measure(_ANSWERS, "tokens of y' (synthetic)", _whole("tokens_synthetic")),
    Measure(_ANSWERS, "tokens of y0 (proto)", _whole("tokens_proto")),
    Measure(_PRECISION, "error of a log-prob (mean size, nats)", _precision(3, lambda n: n.log_prob.mean_absolute)),
    Measure(_PRECISION, "its bias", _precision(3, lambda n: n.log_prob.mean)),
    Measure(_PRECISION, "its largest size", _precision(3, lambda n: n.log_prob.largest_absolute)),
    Measure(_PRECISION, "error of a token (RMS, nats)", _precision(4, lambda n: n.log_prob.per_token_rms)),
    Measure(_PRECISION, "current margin: error / median", _precision_share(lambda n: _noise_share(n.current_margin))),
    Measure(
        _PRECISION, "historical margin: error / median", _precision_share(lambda n: _noise_share(n.historical_margin))
    ),
    Measure(
        _PRECISION,
        "drift from generation (mean size)",
        _precision(3, lambda n: n.drift.mean_absolute if n.drift else None),
    ),
    Measure(
        _PRECISION,
        "the engine's, of a token (RMS, against fp32)",
        _precision(4, lambda n: n.engine_drift.per_token_rms if n.engine_drift else None),
    ),
    Measure(_PRECISION, "drift / median current margin", _precision_share(lambda n: n.drift_share)),
    Measure(_COST, "steps", lambda row: str(row.steps) if row.steps else ABSENT),
    Measure(_COST, "updates skipped", _skipped),
    Measure(_COST, "seconds per step", _whole("seconds", _digits(2))),
    Measure(_COST, "tokens per second", _whole("tokens_per_second", _digits(0))),
    Measure(_COST, "rows filled", _whole("packing_efficiency", percent)),
    Measure(_COST, "prompt tokens saved by sharing", _whole("prompt_share_saved", percent)),
)
