"""The plot of a generation benchmark: one self-contained HTML page."""

from pathlib import Path

import plotly.graph_objects as go

from megatron_tspin.benchmark.answers.results import AnswerResult
from megatron_tspin.benchmark.answers.settings import ENGINES, OURS
from megatron_tspin.benchmark.figure import OTHER_COLOUR, OWN_COLOUR

_GREYS = (OTHER_COLOUR, "#B9BDC4", "#5F646C")


def figure_page(result: AnswerResult) -> str:
    """The page as HTML text."""
    page: str = make_figure(result).to_html(include_plotlyjs=True, full_html=True)
    return page


def make_figure(result: AnswerResult) -> go.Figure:
    """Tokens a second of each engine, by workload; lines from the lowest to the highest round."""
    figure = go.Figure()
    greys = iter(_GREYS)
    for name in (name for name in ENGINES if name in result.settings.engines):
        colour = OWN_COLOUR if name == OURS else next(greys)
        found = [(workload, result.engines[workload, name]) for workload in result.settings.workloads]
        found = [(workload, engine) for workload, engine in found if engine.measurements]
        medians = [engine.tokens_per_second or 0.0 for _, engine in found]
        rates = [[each.tokens_per_second for each in engine.measurements] for _, engine in found]
        errors = {
            "array": [max(each) - median for each, median in zip(rates, medians, strict=True)],
            "arrayminus": [median - min(each) for each, median in zip(rates, medians, strict=True)],
        }
        names = [workload.name.replace(", ", ",<br>") for workload, _ in found]
        figure.add_bar(x=names, y=medians, error_y=errors, marker_color=colour, name=name, texttemplate="%{y:.0f}")
    settings = result.settings
    figure.update_layout(
        title=f"New tokens a second: {Path(settings.model).name} in fp32, up to {settings.new_tokens} tokens an answer"
        f"<br><sub>{result.machine['cpu']}, {settings.threads} threads</sub>",
        template="plotly_white",
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        height=520,
        margin={"t": 110},
    )
    return figure
