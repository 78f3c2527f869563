"""What a run comes to: one sentence, four numbers, and the same beside other runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tspin.config import Config
from megatron_tspin.errors import InputError
from megatron_tspin.records import DecodingResult, Evaluation
from megatron_tspin.report.run_data import RunData
from megatron_tspin.report.significance import CLEAR_DIFFERENCE, compare_decoding
from megatron_tspin.report.tables import ABSENT, accuracy, number, percent
from megatron_tspin.run_folder import HELD_OUT, RunFolder, examples_path
from megatron_tspin.storage import sha256_file


@dataclass(frozen=True)
class Tile:
    """One number of the policy, before and after."""

    label: str
    before: str
    after: str
    verdict: str
    """How the two compare."""


@dataclass(frozen=True)
class ComparedRun:
    """One line of the table that compares runs."""

    name: str
    objective: str
    iterations: str
    before: str
    sampled: str
    greedy: str
    nll: str
    ended: str
    against: str
    """Sampled accuracy against the run that the report is about."""
    hours: str


def headline(run: RunData) -> str:
    """One sentence, made of the numbers alone."""
    first, last = run.evaluations.get(0), run.last_evaluation
    if first is None:
        return "Nothing is measured yet: the initial policy has not been evaluated on held-out prompts."
    if last is None:
        return f"No iteration is evaluated yet; the initial policy {_standing(first)}."
    total = run.config.self_play.iterations
    when = f"After {_iterations(last.iteration)}"
    if last.iteration < total:
        when = f"So far, after {last.iteration} of {_iterations(total)}"
    for name, before, after in _decodings(first, last):
        difference = compare_decoding(before, after)
        if difference is not None:
            verdict = _verdict(difference.value, difference.in_errors, difference.is_clear)
            return (
                f"{when}, the policy answers {accuracy(after)}\u00a0% of {after.num_prompts:,} held-out prompts "
                f"correctly ({name}) against {accuracy(before)}\u00a0% for the initial policy: {verdict}."
            )
    change = last.nll_per_token - first.nll_per_token
    word = "lower" if change < 0 else "higher"
    return (
        f"{when}, the annotated held-out answers cost {last.nll_per_token:.4f} nats per token against "
        f"{first.nll_per_token:.4f} for the initial policy, {abs(change):.4f} {word}; without a scorer "
        f"(evaluation.scorer) no accuracy and no standard error was measured."
    )


def tiles(run: RunData) -> list[Tile]:
    """Held-out numbers of the initial and of the latest policy."""
    first, last = run.evaluations.get(0), run.last_evaluation
    if first is None and last is None:
        return []
    found = [_accuracy_tile(name, first, last) for name in ("sampled", "greedy")]
    before, after = (item.nll_per_token if item else None for item in (first, last))
    change = "" if before is None or after is None else f"{after - before:+.3f} nats".replace("-", "−")
    found.append(Tile("NLL per token of y", number(before, 3), number(after, 3), change))
    before, after = (item.sampled.ended_share if item and item.sampled else None for item in (first, last))
    change = "" if before is None or after is None else _points(after - before)
    found.append(Tile("Answers that end, sampled", percent(before), percent(after), change))
    return [tile for tile in found if (tile.before, tile.after) != (ABSENT, ABSENT)]


def _accuracy_tile(decoding: str, first: Evaluation | None, last: Evaluation | None) -> Tile:
    before, after = (getattr(item, decoding) if item else None for item in (first, last))
    difference = compare_decoding(before, after)
    verdict = "" if difference is None else f"{_points(difference.value)}, {difference.in_errors:.1f}\u00a0SE"
    return Tile(f"Accuracy (%), {decoding}", accuracy(before), accuracy(after), verdict)


def compare_runs(run: RunData, others: Sequence[RunData]) -> list[ComparedRun]:
    """The run and the others, one line each."""
    return [_compared(run, item) for item in (run, *others)]


def differing_data(run: RunData, others: Sequence[RunData]) -> list[str]:
    """Names of the runs whose held-out examples are not this run's, byte for byte, so that numbers do not compare."""
    own = _held_out_hash(run)
    return [item.name for item in others if _held_out_hash(item) != own]


def describe_objective(config: Config) -> str:
    """The method with the settings that matter to it."""
    objective = config.objective
    settings = {
        "tspin": f"alpha {objective.alpha:g}, beta {objective.beta:g}",
        "tspin_ref": f"alpha {objective.alpha:g}, beta {objective.beta:g}",
        "spin": f"lambda {objective.spin_lambda:g}",
        "sft": "",
    }[objective.method]
    nll = f"NLL weight {objective.nll_weight:g}" if objective.nll_weight else ""
    peak = ", ".join(f"{rate:g}" for rate in config.optimizer.lr_by_iteration) or f"{config.optimizer.lr:g}"
    formats = config.precision.label if config.precision.bf16 else ""
    return ", ".join(part for part in (objective.method, settings, nll, f"lr {peak}", formats) if part)


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 59.95:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u00a0h {minutes:02d}\u00a0min" if hours else f"{minutes}\u00a0min {rest:02d}\u00a0s"


def _compared(run: RunData, item: RunData) -> ComparedRun:
    first, last = item.evaluations.get(0), item.last_evaluation
    own = run.last_evaluation
    difference = compare_decoding(own.sampled if own else None, last.sampled if last else None)
    against = ABSENT
    if item is run:
        against = "this run"
    elif difference is not None:
        clear = "clear" if difference.is_clear else "within noise"
        against = f"{_points(difference.value)} ({difference.in_errors:.1f}\u00a0SE, {clear})"
    return ComparedRun(
        name=item.name,
        objective=describe_objective(item.config),
        iterations=f"{last.iteration if last else 0} of {item.config.self_play.iterations}",
        before=accuracy(first.sampled) if first else ABSENT,
        sampled=accuracy(last.sampled) if last else ABSENT,
        greedy=accuracy(last.greedy) if last else ABSENT,
        nll=number(last.nll_per_token, 4) if last else ABSENT,
        ended=percent(last.sampled.ended_share) if last and last.sampled else ABSENT,
        against=against,
        hours=duration(sum(stage.seconds for stage in item.stages)),
    )


def _held_out_hash(run: RunData) -> str | None:
    path = examples_path(RunFolder(run.path).data, HELD_OUT)
    try:
        return sha256_file(path) if path.is_file() else None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _standing(evaluation: Evaluation) -> str:
    for name, result in (("sampled", evaluation.sampled), ("greedy", evaluation.greedy)):
        if result is not None and result.accuracy is not None:
            return f"answers {accuracy(result)}\u00a0% of {result.num_prompts:,} held-out prompts correctly ({name})"
    return f"gives the annotated held-out answers {evaluation.nll_per_token:.4f} nats per token"


def _decodings(first: Evaluation, last: Evaluation) -> list[tuple[str, DecodingResult, DecodingResult]]:
    pairs = (("sampled", first.sampled, last.sampled), ("greedy", first.greedy, last.greedy))
    return [(name, before, after) for name, before, after in pairs if before is not None and after is not None]


def _verdict(value: float, in_errors: float, is_clear: bool) -> str:
    word = "gain" if value > 0 else "loss"
    if is_clear:
        return f"a {word} of {100 * abs(value):.1f} points, {in_errors:.1f} standard errors and so more than chance"
    return (
        f"{_points(value)}, {in_errors:.1f} standard errors, which is less than {CLEAR_DIFFERENCE:g} and may be chance"
    )


def _points(value: float) -> str:
    return f"{100 * value:+.1f} points".replace("-", "−")


def _iterations(count: int) -> str:
    return f"{count} iteration" + ("" if count == 1 else "s")
