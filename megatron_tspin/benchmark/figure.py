"""The plot of a step benchmark: one self-contained HTML page."""

from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megatron_tspin.benchmark.results import StepResult
from megatron_tspin.benchmark.settings import OWN_SIDES

OWN_COLOUR = "#1F83CC"
OTHER_COLOUR = "#8A8F98"
_PREDICTED = "#D55E00"


def figure_page(result: StepResult) -> str:
    """The page as HTML text."""
    page: str = make_figure(result).to_html(include_plotlyjs=True, full_html=True)
    return page


def make_figure(result: StepResult) -> go.Figure:
    """Left: triplets/s with the range over the rounds, and what the operations predict. Right: peak memory."""
    sides = [side for side in result.sides if side.seconds]
    names = [side.name for side in sides]
    colours = [OWN_COLOUR if name in OWN_SIDES else OTHER_COLOUR for name in names]
    rates = [result.triplets_per_second(side) for side in sides]
    figure = make_subplots(
        cols=2, subplot_titles=("triplets/s: median, lowest to highest", "peak memory above weights and gradients, MiB")
    )
    errors = {
        "array": [rate.high - rate.median for rate in rates],
        "arrayminus": [rate.median - rate.low for rate in rates],
    }
    figure.add_bar(x=names, y=[rate.median for rate in rates], error_y=errors, marker_color=colours, name="measured")
    baseline = next((rate.median for side, rate in zip(sides, rates, strict=True) if result.speedup(side) == 1), None)
    if baseline is not None:
        predicted = [baseline * (result.predicted_speedup(side) or 0.0) for side in sides]
        marker = {"color": _PREDICTED, "symbol": "diamond", "size": 10}
        figure.add_scatter(
            x=names, y=predicted, mode="markers", marker=marker, name="predicted from transformers' by FLOPs"
        )
    peaks = [max(side.peak_mib) for side in sides]
    figure.add_bar(x=names, y=peaks, marker_color=colours, showlegend=False, col=2, row=1)
    settings = result.settings
    figure.update_layout(
        title=f"One step without the optimizer: {Path(settings.model).name}, {settings.triplets} triplets, "
        f"{settings.lengths} up to {settings.max_length} tokens<br><sub>{result.machine['cpu']}, "
        f"{settings.threads} threads, {'bf16' if settings.bf16 else 'fp32'}</sub>",
        template="plotly_white",
        legend={"orientation": "h", "y": -0.12},
        height=520,
        margin={"t": 150},
    )
    return figure
