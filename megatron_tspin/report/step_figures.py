"""Figures over the optimizer steps of all iterations."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megatron_tspin.report import style
from megatron_tspin.report.run_data import RunData
from megatron_tspin.report.style import Figure, getter
from megatron_tspin.report.warnings import MIN_ACTIVE_SHARE
from megatron_tspin.step_metrics import StepMetrics

_SMOOTH_FROM = 60  # steps of an iteration; fewer are drawn as they are


@dataclass(frozen=True)
class _Curve:
    """One metric over the steps of all iterations."""

    look: style.Look
    value: Callable[[StepMetrics], float | None]


def log_prob_figure(run: RunData) -> Figure | None:
    """Absolute log-probs of the roles over all steps."""
    if not any(iteration.steps for iteration in run.iterations):
        return None
    figure = make_subplots(rows=1, cols=1)
    curves = [_Curve(look, getter(f"log_prob_{role}")) for role, look in style.ROLES.items()]
    _add_curves(figure, run, curves, row=1)
    _mark_iterations(figure, run, rows=1)
    figure.update_yaxes(title_text="log-probability (nats)")
    figure.update_xaxes(title_text="optimizer step")
    return Figure(
        "log-probs",
        "Log-probabilities of the three responses",
        "Mean sequence log-probability, a sum over the tokens of a response, in each step's batch: y should rise; "
        "y' starts anew in each iteration; if y sinks together with y', probability moves to answers that are neither.",
        style.finish(figure, 400),
    )


def margin_figure(run: RunData) -> Figure | None:
    """Scaled margins, loss and active share over all steps."""
    if not any(iteration.steps for iteration in run.iterations):
        return None
    alpha = run.config.objective.alpha

    def historical(step: StepMetrics) -> float | None:
        return None if step.historical_advantage is None else alpha * step.historical_advantage

    panels: list[tuple[str, list[_Curve]]] = [
        (
            "scaled margin",
            [_Curve(style.CURRENT, getter("current_margin")), _Curve(style.HISTORICAL, historical)],
        ),
        ("loss", [_Curve(style.PLAIN, getter("loss"))]),
        ("active pairs", [_Curve(style.PLAIN, getter("active_share"))]),
    ]
    panels = [panel for panel in panels if _has_values(run, panel[1])]
    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.05)
    for row, (title, curves) in enumerate(panels, start=1):
        _add_curves(figure, run, curves, row, showlegend=title == "scaled margin")
        figure.update_yaxes(title_text=title, row=row)
        if title == "active pairs":
            figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%", row=row)
            figure.add_hline(MIN_ACTIVE_SHARE, row=row, line={"color": style.LIMIT, "width": 2})
        if title == "scaled margin":
            figure.add_hline(0, row=row, line={"color": style.BOUNDARY, "width": 1})
    _mark_iterations(figure, run, rows=len(panels))
    figure.update_xaxes(title_text="optimizer step", row=len(panels))
    if len(panels) == 1:
        title, caption = "Loss", "The loss of each step's batch; it falls within an iteration if the policy learns."
    else:
        title = "Margins, loss and active pairs"
        caption = (
            "The margin is what the link function sees; a pair beyond 5 has no slope left and is not active. Where the "
            "active pairs are below the orange line (20 %), the loss is small because little is left to learn from, "
            "not because the policy is good."
        )
    return Figure(
        "margins",
        title,
        caption,
        style.finish(figure, 200 * len(panels) + 60),
    )


def _has_values(run: RunData, curves: list[_Curve]) -> bool:
    return any(curve.value(step) is not None for curve in curves for item in run.iterations for step in item.steps)


def _offsets(run: RunData) -> list[int]:
    """Steps before each iteration."""
    return [0, *accumulate(len(iteration.steps) for iteration in run.iterations)]


def _add_curves(figure: go.Figure, run: RunData, curves: list[_Curve], row: int, showlegend: bool = True) -> None:
    """Metrics over the steps of all iterations, interrupted between them; long iterations also get a running mean."""
    smooth = any(len(item.steps) >= _SMOOTH_FROM for item in run.iterations)
    for curve in curves:
        if not _has_values(run, [curve]):
            continue
        x: list[float | None] = []
        raw: list[float | None] = []
        mean: list[float | None] = []
        hover: list[str] = []
        for offset, item in zip(_offsets(run), run.iterations, strict=False):
            values = [curve.value(step) for step in item.steps]
            x += [*(offset + number for number in range(1, len(values) + 1)), None]
            raw += [*values, None]
            mean += [*_running_mean(values), None]
            hover += [*(f"iteration {item.index}, step {step.step}" for step in item.steps), ""]
        figure.add_trace(
            style.line(
                curve.look,
                x,
                raw,
                mode="lines" if smooth else "lines+markers",
                marker={"size": 5, "color": curve.look.colour, "symbol": curve.look.symbol},
                opacity=0.3 if smooth else 1,
                showlegend=showlegend and not smooth,
                customdata=hover,
                hovertemplate="%{y:.4g} (%{customdata})",
            ),
            row=row,
            col=1,
        )
        if smooth:
            figure.add_trace(
                style.line(curve.look, x, mean, mode="lines", showlegend=showlegend, hoverinfo="skip"), row=row, col=1
            )


def _running_mean(values: list[float | None]) -> list[float | None]:
    """Centred mean over a twentieth of the iteration on either side."""
    half = max(1, len(values) // 20)
    means: list[float | None] = []
    for position in range(len(values)):
        known = [value for value in values[max(0, position - half) : position + half + 1] if value is not None]
        means.append(sum(known) / len(known) if known else None)
    return means


def _mark_iterations(figure: go.Figure, run: RunData, rows: int) -> None:
    """Vertical lines where an iteration begins, its name at the top."""
    offsets = _offsets(run)
    for offset, item in zip(offsets, run.iterations, strict=False):
        if not item.steps:
            continue
        for row in range(1, rows + 1):
            if offset:
                figure.add_vline(offset + 0.5, row=row, line={"color": style.BOUNDARY, "width": 1, "dash": "dot"})
        figure.add_annotation(
            x=offset + (len(item.steps) + 1) / 2,
            y=1,
            yref="y domain",
            yanchor="bottom",
            text=f"iteration {item.index}",
            showarrow=False,
        )
    figure.update_xaxes(range=[0.5, offsets[-1] + 0.5])
