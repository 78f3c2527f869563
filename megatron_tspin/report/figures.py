"""The figures of a report, each with a sentence that says how to read it."""

from collections.abc import Sequence

import plotly.graph_objects as go

from megatron_tspin.report import style
from megatron_tspin.report.headline import duration
from megatron_tspin.report.iteration_figures import accuracy_figure, alignment_figure, length_figure
from megatron_tspin.report.length_histograms import histogram_figure
from megatron_tspin.report.run_data import RunData
from megatron_tspin.report.step_figures import log_prob_figure, margin_figure
from megatron_tspin.report.style import Figure


def all_figures(run: RunData, others: Sequence[RunData] = ()) -> list[Figure]:
    """The figures that the run has data for, in the order of the report."""
    made = (
        accuracy_figure(run, others),
        log_prob_figure(run),
        alignment_figure(run, others),
        margin_figure(run),
        length_figure(run),
        histogram_figure(run),
        time_figure(run),
    )
    return [figure for figure in made if figure is not None]


def time_figure(run: RunData) -> Figure | None:
    """Wall time of each stage."""
    if not run.stages:
        return None
    names = [style.plain(stage.stage) for stage in run.stages]
    kinds = [next((kind for kind in ("rollout", "train") if name.startswith(kind)), "other") for name in names]
    seconds = [stage.seconds for stage in run.stages]
    bar = go.Bar(
        x=seconds,
        y=names,
        orientation="h",
        marker={"color": [style.STAGE_COLOURS[kind] for kind in kinds]},
        text=[duration(value) for value in seconds],
        textposition="outside",
        cliponaxis=False,
        hoverinfo="skip",
    )
    figure = go.Figure(bar)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(title_text="seconds", range=[0, max(seconds) * 1.12 or 1])
    by_kind = {
        kind: sum(stage.seconds for stage, own in zip(run.stages, kinds, strict=True) if own == kind)
        for kind in style.STAGE_COLOURS
    }
    total = sum(seconds) or 1.0
    shares = ", ".join(f"{kind} {value / total:.0%}" for kind, value in by_kind.items() if value)
    return Figure(
        "time",
        "Time per stage",
        f"{duration(sum(seconds))} in all, of which {shares}; start-up of the processes is included.",
        style.finish(figure, 110 + 26 * len(names)),
    )
