"""Signs that a run is not learning what it should: what was measured, what it means, what to try.

The conditions are those that toy runs and a small language model showed; each is a pure function of the run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_tspin.report.run_data import Iteration, RunData, weighted_mean
from megatron_tspin.report.significance import compare_decoding
from megatron_tspin.run_folder import RunFolder

MIN_ACTIVE_SHARE = 0.20
MAX_ENDED_DROP = 0.10
MIN_ENDED_SHARE = 0.50
MAX_IDENTICAL_SHARE = 0.50
MAX_EMPTY_SHARE = 0.01
MAX_LENGTH_FACTOR = 2.0
SMALLEST_DROP = 0.005  # of a log-prob, as a share of it: less is a standstill, not a fall


@dataclass(frozen=True)
class Warning_:
    """One thing to look at."""

    kind: str
    title: str
    measured: str
    """The numbers."""
    meaning: str
    remedy: str


def find_warnings(run: RunData) -> list[Warning_]:
    """All warnings of a run, the most serious first."""
    found = (check(run) for check in _CHECKS)
    return [warning for warning in found if warning is not None]


def saturation(run: RunData) -> Warning_ | None:
    """Fewer than 20 % of the pairs carry a gradient."""
    low = []
    for iteration in run.iterations:
        share = weighted_mean(iteration.late, "active_share")
        if share is not None and share < MIN_ACTIVE_SHARE:
            skipped = sum(step.update_skipped for step in iteration.steps)
            more = f", {skipped} of {len(iteration.steps)} updates skipped" if skipped else ""
            low.append(f"iteration {iteration.index}: {_percent(share)} of the pairs active{more}")
    if not low:
        return None
    scale = "spin_lambda" if run.config.objective.method == "spin" else "alpha"
    return Warning_(
        "saturation",
        "Saturation: few pairs still carry a gradient",
        f"{_joined(low)} (active: scaled margin at most 5; the limit here is {_percent(MIN_ACTIVE_SHARE)}).",
        "The policy already tells almost every y from its y'; the loss is near zero and only the few remaining pairs, "
        "often short or odd ones, move the weights.",
        f"A smaller `objective.{scale}`, a lower `generation.temperature` so that y' comes closer to y, or an end of "
        "the run here.",
    )


def runaway(run: RunData) -> Warning_ | None:
    """The loss falls while the policy gets worse."""
    signs = _sinking_annotated(run) + _ended_drops(run)
    if not signs:
        return None
    return Warning_(
        "runaway",
        "Runaway: the loss falls while the policy gets worse",
        f"{_joined(signs)}.",
        "The policy wins the comparison by pushing y' down, not by pulling y up. A falling loss is no sign of "
        "progress here.",
        "Keep an earlier policy, chosen by held-out accuracy (`iteration_*/checkpoint`); then fewer steps or a lower "
        "`optimizer.lr`, a smaller `objective.alpha`, or `objective.nll_weight` above 0 (not part of the paper).",
    )


def displacement(run: RunData) -> Warning_ | None:
    """The log-probs of y and y' sink together while their margin grows, within an iteration."""
    found = []
    for iteration in run.iterations:
        annotated = _held_out_change(run, iteration.index) or _change(iteration, "log_prob_annotated")
        synthetic = _change(iteration, "log_prob_synthetic")
        margin = _change(iteration, "current_margin")
        if annotated and synthetic and margin and _sank(*annotated) and _sank(*synthetic) and margin[1] > margin[0]:
            found.append(
                f"iteration {iteration.index}: log-prob of y {_arrow(annotated)}, of y' {_arrow(synthetic)}, "
                f"margin {_arrow(margin, 2)}"
            )
    if not found:
        return None
    return Warning_(
        "displacement",
        "Likelihood displacement: y and y' sink together",
        f"{_joined(found)}.",
        "The margin grows only because y' falls faster than y: probability moves to answers that are neither.",
        "`objective.nll_weight` above 0 (not part of the paper) holds y up; so do a lower `optimizer.lr` and a smaller "
        "`objective.alpha`.",
    )


def better_before(run: RunData) -> Warning_ | None:
    """An earlier policy answers the held-out prompts better than the last one, by more than two standard errors."""
    last = run.last_evaluation
    if last is None or last.sampled is None:
        return None
    scored = {
        number: item.sampled
        for number, item in run.evaluations.items()
        if number < last.iteration and item.sampled is not None and item.sampled.accuracy is not None
    }
    if not scored:
        return None
    best = max(scored, key=lambda number: scored[number].accuracy or 0.0)
    difference = compare_decoding(last.sampled, scored[best])
    if difference is None or not difference.is_clear or difference.value < 0:
        return None
    folder = RunFolder(run.path)
    where = (folder.initial_checkpoint if best == 0 else folder.checkpoints(best - 1)).relative_to(run.path)
    return Warning_(
        "better_before",
        "The last policy is not the best one",
        f"Sampled held-out accuracy {_percent(scored[best].accuracy, 1)} after {best} iterations, "
        f"{_percent(last.sampled.accuracy, 1)} after {last.iteration} ({difference.in_errors:.1f} standard errors).",
        "Later iterations undid what earlier ones had taught.",
        f"Export the better policy from `{where}`; then fewer iterations or a lower `optimizer.lr_by_iteration`.",
    )


def never_ending(run: RunData) -> Warning_ | None:
    """Fewer than half of the sampled answers end."""
    shares = [(f"y' of iteration {item.index}", item.synthetic) for item in run.iterations]
    shares.append(("y0", run.proto))
    low = [
        f"{name}: {_percent(summary.ended_share)} of {summary.num_responses:,} answers ended"
        for name, summary in shares
        if summary is not None and summary.ended_share < MIN_ENDED_SHARE
    ]
    if not low:
        return None
    passed_over = sorted({summary.passed_over for _, summary in shares if summary and summary.passed_over})
    if passed_over:
        return Warning_(
            "never_ending",
            "Most answers never end",
            f"{_joined(low)} within {run.config.generation.max_new_tokens} new tokens; most of the others hold "
            f"{', '.join(map(repr, passed_over))} and go on after it.",
            "The policy ends its answers with a token that this run does not take for an end: neither the tokenizer's "
            "EOS, nor `eos_token_id` in the checkpoint's configs, nor the chat template names it.",
            f"Start again with `data.closing_token: {passed_over[0]!r}`, or name it in the checkpoint's "
            "generation_config.json.",
        )
    return Warning_(
        "never_ending",
        "Most answers never end",
        f"{_joined(low)} within {run.config.generation.max_new_tokens} new tokens.",
        "An answer that was cut off has no EOS, so training compares whole y with torn y', and a scorer counts it as "
        "wrong.",
        "A larger `generation.max_new_tokens`, a `data.template` that the policy knows, or a short SFT "
        "(`objective.method: sft`) before the self-play.",
    )


def identical(run: RunData) -> Warning_ | None:
    """More than half of the y' are their y."""
    high = []
    for iteration in run.iterations:
        share = iteration.synthetic.identical_share if iteration.synthetic else None
        share = weighted_mean(iteration.steps, "identical_share") if share is None else share
        if share is not None and share > MAX_IDENTICAL_SHARE:
            high.append(f"iteration {iteration.index}: {_percent(share)} of the y' equal their y")
    if not high:
        return None
    return Warning_(
        "identical",
        "Most synthetic answers equal the annotated ones",
        f"{_joined(high)}.",
        "A pair with y' = y teaches the current advantage nothing; the policy reproduces its training answers.",
        "Prompts it has not mastered, a higher `generation.temperature`, or an end of the run here.",
    )


def length_drift(run: RunData) -> Warning_ | None:
    """The mean length of y' changed by more than a factor of two since the first policy."""
    lengths = [(item.index, item.synthetic.mean_tokens) for item in run.iterations if item.synthetic]
    first = run.proto.mean_tokens if run.proto else (lengths[0][1] if lengths else 0.0)
    far = [
        f"iteration {index}: {tokens:.1f} tokens"
        for index, tokens in lengths
        if max(first, tokens) > MAX_LENGTH_FACTOR * min(first, tokens)
    ]
    if not far:
        return None
    return Warning_(
        "length_drift",
        "The length of the synthetic answers drifts",
        f"Mean length of y' {first:.1f} tokens from the first policy; {_joined(far)}.",
        "Log-probs are sums over tokens, so the objective can be won by length alone.",
        "A look at the samples below; a smaller `objective.alpha`, a lower `optimizer.lr`, or `objective.nll_weight` "
        "above 0 (not part of the paper).",
    )


def empty_responses(run: RunData) -> Warning_ | None:
    """Answers that consist of the EOS alone."""
    summaries = [(f"y' of iteration {item.index}", item.synthetic) for item in run.iterations]
    summaries.append(("y0", run.proto))
    high = [
        f"{name}: {_percent(summary.empty_share, 1)} of {summary.num_responses:,}"
        for name, summary in summaries
        if summary is not None and summary.empty_share >= MAX_EMPTY_SHARE
    ]
    if not high:
        return None
    return Warning_(
        "empty_responses",
        "Empty answers",
        f"Answers without any text: {_joined(high)}.",
        "An empty y' has a single token and so a high log-prob: a pair with it says little about what a good answer "
        "looks like.",
        "A check that `data.template` ends where the policy expects its answer to begin, and that the tokenizer's EOS "
        "is the one the policy was trained with.",
    )


def noisy_margins(run: RunData) -> Warning_ | None:
    """Low precision moves margins by more than the configured share of their size."""
    limit = run.config.precision.noise_warning
    high = []
    for iteration in run.iterations:
        noise = iteration.precision
        for name, margin in (
            (("current", noise.current_margin), ("historical", noise.historical_margin)) if noise else ()
        ):
            if margin is not None and margin.noise_share is not None and margin.noise_share > limit:
                high.append(
                    f"iteration {iteration.index}: {name} margins off by {_small(margin.noise.mean_absolute)} on "
                    f"average, {_percent(margin.noise_share, 1)} of the median {_small(margin.median_absolute)}"
                )
    if not high:
        return None
    referenced = any(item.precision and item.precision.without_reference for item in run.iterations)
    without = ", reference log-probs left out" if referenced else ""
    return Warning_(
        "noisy_margins",
        "Rounding moves the margins",
        f"{_joined(high)}, as trained against fp32 on the same responses{without} (the limit here is "
        f"{_percent(limit, 1)}).",
        "Errors of tokens add up over a response, and the loss sees differences of whole responses: how much a step "
        "learns from a pair is partly rounding, and a small margin may even have the wrong sign.",
        _finer(run),
    )


def drifting(run: RunData) -> Warning_ | None:
    """Generation and training give the same answers log-probs that differ by a good share of the margins."""
    limit = run.config.precision.noise_warning
    high = [
        f"iteration {item.index}: {_small(noise.drift.mean_absolute)} nats on average (bias "
        f"{_small(noise.drift.mean)}), scaled {_percent(noise.drift_share, 1)} of the median margin"
        for item in run.iterations
        if (noise := item.precision) and noise.drift and noise.drift_share is not None and noise.drift_share > limit
    ]
    if not high:
        return None
    return Warning_(
        "drifting",
        "Training and generation disagree about y'",
        f"Log-prob of y' as trained minus as sampled: {_joined(high)} (the limit here is {_percent(limit, 1)}).",
        "The answers come from another distribution than the one that is trained: y' is not quite the opponent's own.",
        _finer(run) + " The figures against fp32 say whether training is the side that is off.",
    )


def _finer(run: RunData) -> str:
    """What to set for less rounding."""
    if run.config.precision.fp8 is None:
        return "fp32 (leave `--bf16` out), or shorter answers."
    return (
        "More layers outside FP8 (`--num-layers-at-start-in-bf16`, `--num-layers-at-end-in-bf16`), another "
        "`--fp8-recipe` such as rowwise, or bf16 alone (leave `--fp8-format` out)."
    )


_CHECKS: tuple[Callable[[RunData], Warning_ | None], ...] = (
    runaway,
    displacement,
    better_before,
    saturation,
    never_ending,
    identical,
    length_drift,
    empty_responses,
    noisy_margins,
    drifting,
)


def _sinking_annotated(run: RunData) -> list[str]:
    """Two iterations running in which log-prob(y) sank while the loss fell, as found on the best data there is."""
    values: dict[int, float | None] = {number: item.log_prob_annotated for number, item in run.evaluations.items()}
    source, needs_fall = "held-out log-prob of y", 0
    if len(values) < 3:
        values = {item.index: weighted_mean(item.late, "log_prob_annotated") for item in run.iterations}
        # Here the value of iteration k is measured in it: the drop from k to k + 1 happens in iteration k + 1.
        source, needs_fall = "log-prob of y in training", 1
    fell = {item.index: _loss_fell(item) for item in run.iterations}
    signs = []
    for number in sorted(values):
        series = [values.get(number), values.get(number + 1), values.get(number + 2)]
        known = [value for value in series if value is not None]
        blamed = (number + needs_fall, number + needs_fall + 1)
        if len(known) == 3 and _sank(*known[:2]) and _sank(*known[1:]) and all(fell.get(item) for item in blamed):
            signs.append(
                f"{source} {_arrow(known)} over iterations {blamed[0]} and {blamed[1]}, while the loss fell in both"
            )
    return signs


def _ended_drops(run: RunData) -> list[str]:
    """Iterations after which at least 10 points fewer of the sampled answers end, while the loss fell."""
    rollouts = {item.index: item.synthetic for item in run.iterations if item.synthetic}
    held_out = {number: item.sampled for number, item in run.evaluations.items() if item.sampled}
    signs = []
    for iteration in run.iterations:
        before, after = iteration.index, iteration.index + 1
        if before in rollouts and after in rollouts:
            shares = (rollouts[before].ended_share, rollouts[after].ended_share)
            count = rollouts[after].num_responses
        elif before in held_out and after in held_out:
            shares = (held_out[before].ended_share, held_out[after].ended_share)
            count = held_out[after].num_prompts
        else:
            continue
        if shares[0] - shares[1] > MAX_ENDED_DROP and _loss_fell(iteration):
            signs.append(
                f"answers that end {_percent(shares[0])} → {_percent(shares[1])} (of {count:,}) over iteration "
                f"{before}, while the loss fell"
            )
    return signs


def _loss_fell(iteration: Iteration) -> bool:
    change = _change(iteration, "loss")
    return change is not None and change[1] < change[0]


def _held_out_change(run: RunData, index: int) -> tuple[float, float] | None:
    """Held-out log-prob of y before and after an iteration: free of the noise of differing batches."""
    before, after = run.evaluations.get(index), run.evaluations.get(index + 1)
    return (before.log_prob_annotated, after.log_prob_annotated) if before and after else None


def _change(iteration: Iteration, field: str) -> tuple[float, float] | None:
    """Means over the first and the second half of the steps."""
    early, late = weighted_mean(iteration.early, field), weighted_mean(iteration.late, field)
    return None if early is None or late is None else (early, late)


def _sank(before: float, after: float) -> bool:
    return before - after > SMALLEST_DROP * abs(before)


def _arrow(change: Sequence[float], digits: int = 1) -> str:
    return " → ".join(f"{value:.{digits}f}" for value in change).replace("-", "−")


def _percent(share: float | None, digits: int = 0) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def _small(value: float) -> str:
    return (f"{value:.2g}" if abs(value) < 100 else f"{value:,.0f}").replace("-", "−")


def _joined(parts: list[str]) -> str:
    return "; ".join(parts)
