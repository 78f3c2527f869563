"""The table per iteration: one source for the report and for the terminal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_tspin.records import DecodingResult, Evaluation, MarginNoise, PrecisionNoise, RolloutSummary
from megatron_tspin.report.run_data import Iteration, RunData, weighted_mean
from megatron_tspin.report.warnings import MIN_ACTIVE_SHARE, find_warnings

ABSENT = "–"
_LABEL_WIDTH, _COLUMN_WIDTH = 40, 13  # of the terminal's table


@dataclass(frozen=True)
class IterationRow:
    """One iteration: its training, the answers it trained on, and the policy that came out.

    Numbers of the policy are means over the second half of the steps, where the iteration has arrived; numbers of the
    data are means over all of them. Log-probs are sums over the tokens of a response, in nats.
    """

    iteration: int | None
    """None is the start: the initial policy, no training."""
    steps: int = 0
    skipped: int = 0
    loss_early: float | None = None
    loss_late: float | None = None
    log_prob_annotated: float | None = None
    log_prob_synthetic: float | None = None
    log_prob_proto: float | None = None
    reward_annotated: float | None = None
    reward_synthetic: float | None = None
    current_advantage: float | None = None
    historical_advantage: float | None = None
    current_margin: float | None = None
    historical_margin: float | None = None
    active_share: float | None = None
    identical_share: float | None = None
    tokens_annotated: float | None = None
    tokens_synthetic: float | None = None
    tokens_proto: float | None = None
    seconds_per_step: float | None = None
    tokens_per_second: float | None = None
    packing_efficiency: float | None = None
    prompt_share_saved: float | None = None
    entropy_annotated: float | None = None
    entropy_synthetic: float | None = None
    top_annotated: float | None = None
    top_synthetic: float | None = None
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
    late = {
        field: weighted_mean(iteration.late, field)
        for field in (
            "log_prob_annotated",
            "log_prob_synthetic",
            "log_prob_proto",
            "reward_annotated",
            "reward_synthetic",
            "current_advantage",
            "historical_advantage",
            "current_margin",
            "active_share",
            "entropy_annotated",
            "entropy_synthetic",
            "top_annotated",
            "top_synthetic",
        )
    }
    whole = {
        field: weighted_mean(iteration.steps, field)
        for field in (
            "identical_share",
            "tokens_annotated",
            "tokens_synthetic",
            "tokens_proto",
            "tokens_per_second",
            "packing_efficiency",
            "prompt_share_saved",
        )
    }
    historical = late["historical_advantage"]
    return IterationRow(
        iteration=iteration.index,
        steps=len(iteration.steps),
        skipped=sum(step.update_skipped for step in iteration.steps),
        loss_early=weighted_mean(iteration.early, "loss"),
        loss_late=weighted_mean(iteration.late, "loss"),
        historical_margin=None if historical is None else run.config.objective.alpha * historical,
        seconds_per_step=weighted_mean(iteration.steps, "seconds"),
        rollout=iteration.synthetic,
        precision=iteration.precision,
        evaluation=run.evaluations.get(iteration.index + 1),
        **late,
        **whole,
    )


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
    low = row.active_share is not None and row.active_share < MIN_ACTIVE_SHARE
    return percent(row.active_share) + (" !" if low else "")


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


def _field(field: str, digits: int = 1) -> Callable[[IterationRow], str]:
    return lambda row: number(getattr(row, field), digits)


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
    Measure(_TRAINING, "log-prob of y (annotated)", _field("log_prob_annotated")),
    Measure(_TRAINING, "log-prob of y' (synthetic)", _field("log_prob_synthetic")),
    Measure(_TRAINING, "log-prob of y0 (proto)", _field("log_prob_proto")),
    Measure(_TRAINING, "reward of y", _field("reward_annotated", 2)),
    Measure(_TRAINING, "reward of y'", _field("reward_synthetic", 2)),
    Measure(_TRAINING, "current advantage", _field("current_advantage")),
    Measure(_TRAINING, "historical advantage", _field("historical_advantage")),
    Measure(_TRAINING, "current margin (scaled)", _field("current_margin", 2)),
    Measure(_TRAINING, "historical margin (scaled)", _field("historical_margin", 2)),
    Measure(_TRAINING, "active pairs", _active),
    Measure(_TRAINING, "entropy at y (nats per token)", _field("entropy_annotated", 2)),
    Measure(_TRAINING, "entropy at y'", _field("entropy_synthetic", 2)),
    Measure(_TRAINING, "tokens of y that are the most probable", lambda row: percent(row.top_annotated)),
    Measure(_TRAINING, "tokens of y' that are the most probable", lambda row: percent(row.top_synthetic)),
    Measure(_TRAINING, "loss", _field("loss_late", 3)),
    Measure(_TRAINING, "loss, first half of the steps", _field("loss_early", 3)),
    Measure(_ANSWERS, "answers that end (start: y0)", _rollout("ended_share")),
    Measure(_ANSWERS, "answers that are empty", _rollout("empty_share")),
    Measure(_ANSWERS, "y' = y", lambda row: percent(row.identical_share)),
    Measure(_ANSWERS, "tokens of y (annotated)", _field("tokens_annotated")),
    Measure(_ANSWERS, "tokens of y' (synthetic)", _field("tokens_synthetic")),
    Measure(_ANSWERS, "tokens of y0 (proto)", _field("tokens_proto")),
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
    Measure(_PRECISION, "drift / median current margin", _precision_share(lambda n: n.drift_share)),
    Measure(_COST, "steps", lambda row: str(row.steps) if row.steps else ABSENT),
    Measure(_COST, "updates skipped", _skipped),
    Measure(_COST, "seconds per step", _field("seconds_per_step", 2)),
    Measure(_COST, "tokens per second", _field("tokens_per_second", 0)),
    Measure(_COST, "rows filled", lambda row: percent(row.packing_efficiency)),
    Measure(_COST, "prompt tokens saved by sharing", lambda row: percent(row.prompt_share_saved)),
)
