"""Figures with one point an iteration, several runs in one plot where they compare."""

from collections.abc import Callable, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megatron_tspin.records import DecodingResult, Evaluation
from megatron_tspin.report import style
from megatron_tspin.report.run_data import RunData
from megatron_tspin.report.style import Figure
from megatron_tspin.report.tables import iteration_rows

_PANEL_SPACING = 0.075


def misaligned_iterations(run: RunData) -> list[int]:
    """Iterations in which y is less probable than y', in the second half of the steps."""
    found = []
    for row in iteration_rows(run):
        annotated, synthetic = (row.late.get(f"log_prob_{role}") for role in ("annotated", "synthetic"))
        if row.iteration is not None and annotated is not None and synthetic is not None and annotated < synthetic:
            found.append(row.iteration)
    return found


def alignment_figure(run: RunData, others: Sequence[RunData] = ()) -> Figure | None:
    """Reward against likelihood per iteration (paper, Figures 3 and 7), one row of panels a run."""
    shown = [item for item in (run, *others) if _has_pairs(item)]
    if not shown:
        return None
    titles = ("reward", "log-probability", "log-probability per token")
    figure = make_subplots(
        rows=len(shown),
        cols=3,
        horizontal_spacing=_PANEL_SPACING,
        vertical_spacing=0.24 / len(shown),
        subplot_titles=[
            f"{style.plain(item.name)} ({item.config.objective.method}): {title}" for item in shown for title in titles
        ],
    )
    for position, item in enumerate(shown, start=1):
        _add_alignment(figure, item, position)
    figure.update_xaxes(title_text="iteration", row=len(shown))
    figure.update_xaxes(dtick=1)
    return Figure(
        "alignment",
        "Reward against likelihood",
        "Reward is alpha times the log-probability (tspin), so the two agree by construction, or a scaled log-ratio to "
        "the previous policy (spin, tspin_ref), where y can earn more and yet be less probable than y'. Shaded: "
        f"iterations in which y is less probable ({_named_misaligned(shown)}). Sums favour short responses, hence the "
        "last panel: mean log-probability over mean length.",
        style.finish(figure, 70 + 250 * len(shown)),
    )


def accuracy_figure(run: RunData, others: Sequence[RunData] = ()) -> Figure | None:
    """Held-out accuracy and NLL after each iteration, all runs in one plot."""
    runs = [run, *others]
    kinds: list[tuple[str, Callable[[Evaluation], DecodingResult | None] | None]] = [
        ("accuracy, sampled", lambda item: item.sampled),
        ("accuracy, greedy", lambda item: item.greedy),
        ("NLL per token of y", None),
    ]
    kinds = [kind for kind in kinds if any(_points(item, kind[1]) for item in runs)]
    if not kinds:
        return None
    figure = make_subplots(
        rows=1, cols=len(kinds), horizontal_spacing=_PANEL_SPACING, subplot_titles=[title for title, _ in kinds]
    )
    for position, item in enumerate(runs):
        look = style.run_look(position, item.name)
        for column, (_, decoding) in enumerate(kinds, start=1):
            points = _points(item, decoding)
            shift = 0.06 * (position - (len(runs) - 1) / 2)
            figure.add_trace(
                style.line(
                    look,
                    [number + shift for number, _, _ in points],
                    [value for _, value, _ in points],
                    error_y={"array": [error for _, _, error in points], "thickness": 1.4, "width": 4},
                    showlegend=len(runs) > 1 and column == 1,
                    hovertemplate="%{y}",
                ),
                row=1,
                col=column,
            )
    for column, (_, decoding) in enumerate(kinds, start=1):
        figure.update_yaxes(
            tickformat=".0%" if decoding else "", rangemode="tozero" if decoding else "normal", col=column
        )
    figure.update_xaxes(title_text="iterations behind the policy", dtick=1)
    figure = style.finish(figure, 360)
    figure.update_layout(hovermode="closest")
    return Figure(
        "accuracy",
        "Held-out results after each iteration",
        "0 is the initial policy; bars are one standard error, so differences below about two of them are noise. "
        "Sampled stands beside greedy because greedy can hide a decline; for the NLL, lower is better.",
        figure,
    )


def length_figure(run: RunData) -> Figure | None:
    """Lengths and shares of answers that end, per iteration."""
    rows = iteration_rows(run)
    held_out = style.Look("held-out, sampled", "#CC79A7", "dashdot", "triangle-up")
    greedy = style.Look("held-out, greedy", "#8A8F98", "solid", "x")
    figure = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=_PANEL_SPACING,
        subplot_titles=("mean length (tokens)", "answers that end with EOS"),
    )
    training = [row for row in rows if row.iteration is not None]
    for role, look in style.ROLES.items():
        lengths = [row.whole[f"tokens_{role}"] for row in training]
        _add_row_line(figure, look, [row.iteration for row in training], lengths, 1)
    synthetic = [(row.iteration, row.rollout.ended_share) for row in training if row.rollout]
    _add_row_line(figure, style.ROLES["synthetic"], *_columns(synthetic), 2, showlegend=False)
    if run.proto:
        _add_row_line(figure, style.ROLES["proto"], [0], [run.proto.ended_share], 2, showlegend=False)
    for look, decoding in ((held_out, "sampled"), (greedy, "greedy")):
        results = [(number, getattr(item, decoding)) for number, item in sorted(run.evaluations.items())]
        known = [(number, result) for number, result in results if result is not None]
        _add_row_line(figure, look, *_columns([(number, item.mean_tokens) for number, item in known]), 1)
        _add_row_line(
            figure, look, *_columns([(number, item.ended_share) for number, item in known]), 2, showlegend=False
        )
    if not figure.data:
        return None
    figure.update_yaxes(rangemode="tozero", col=1)
    figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%", col=2)
    figure.update_xaxes(title_text="iterations behind the policy that answered", dtick=1)
    return Figure(
        "lengths",
        "Lengths and endings",
        "Training answers and held-out answers by the policy that wrote them: log-probs are sums, so a drifting length "
        "moves them by itself; an answer without EOS was cut off at the limit and counts as wrong.",
        style.finish(figure, 340),
    )


def _has_pairs(run: RunData) -> bool:
    return any(row.late.get("reward_synthetic") is not None for row in iteration_rows(run))


def _add_alignment(figure: go.Figure, run: RunData, position: int) -> None:
    rows = [row for row in iteration_rows(run) if row.iteration is not None]
    numbers = [row.iteration for row in rows]
    for role in ("annotated", "synthetic"):
        look = style.ROLES[role]
        log_probs = [row.late[f"log_prob_{role}"] for row in rows]
        lengths = [row.whole[f"tokens_{role}"] for row in rows]
        per_token = [
            value / length if value is not None and length else None
            for value, length in zip(log_probs, lengths, strict=True)
        ]
        panels = ([row.late[f"reward_{role}"] for row in rows], log_probs, per_token)
        for column, values in enumerate(panels, start=1):
            trace = style.line(
                look, numbers, values, showlegend=position == 1 and column == 1, hovertemplate="%{y:.3f}"
            )
            figure.add_trace(trace, row=position, col=column)
    for number in misaligned_iterations(run):
        for column in (1, 2):
            figure.add_vrect(
                number - 0.4,
                number + 0.4,
                row=position,
                col=column,
                fillcolor=style.MISALIGNED_FILL,
                line_width=0,
                layer="below",
            )


def _named_misaligned(runs: Sequence[RunData]) -> str:
    parts = []
    for item in runs:
        numbers = ", ".join(map(str, misaligned_iterations(item)))
        parts.append(f"{item.name}: {numbers or 'none'}")
    return "; ".join(parts)


def _points(
    run: RunData, decoding: Callable[[Evaluation], DecodingResult | None] | None
) -> list[tuple[int, float, float]]:
    """(iterations behind the policy, value, standard error) of what was measured; without `decoding` the NLL."""
    points = []
    for number, evaluation in sorted(run.evaluations.items()):
        if decoding is None:
            points.append((number, evaluation.nll_per_token, 0.0))
        elif (result := decoding(evaluation)) is not None and result.accuracy is not None:
            points.append((number, result.accuracy, result.standard_error or 0.0))
    return points


def _columns(pairs: Sequence[tuple[int | None, float]]) -> tuple[list[int | None], list[float | None]]:
    return [first for first, _ in pairs], [second for _, second in pairs]


def _add_row_line(
    figure: go.Figure,
    look: style.Look,
    x: list[int | None],
    y: list[float | None],
    column: int,
    showlegend: bool = True,
) -> None:
    if any(value is not None for value in y):
        trace = style.line(look, x, y, showlegend=showlegend, hovertemplate="%{y:.3~f}")
        figure.add_trace(trace, row=1, col=column)
