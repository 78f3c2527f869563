"""Colours, markers and layout of the figures. A role or a run looks the same in all of them.

Colours follow Okabe and Ito's, told apart by colour-blind readers; roles also differ in dash and marker. All
stand out on a white and on a dark page.
"""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go


@dataclass(frozen=True)
class Figure:
    """A plot and how to read it."""

    key: str
    title: str
    caption: str
    plot: go.Figure


@dataclass(frozen=True)
class Look:
    """How one role or run is drawn."""

    name: str
    colour: str
    dash: str
    symbol: str


ROLES = {
    "annotated": Look("y (annotated)", "#1F83CC", "solid", "circle"),
    "synthetic": Look("y' (synthetic)", "#D55E00", "dash", "square"),
    "proto": Look("y0 (proto)", "#009E73", "dot", "diamond"),
}
CURRENT = Look("current", "#D55E00", "solid", "circle")
HISTORICAL = Look("historical", "#009E73", "dot", "diamond")
PLAIN = Look("", "#7A6FA8", "solid", "circle")
STAGE_COLOURS = {"rollout": "#CC79A7", "train": "#1F83CC", "other": "#8A8F98"}
MISALIGNED_FILL = "rgba(230, 159, 0, 0.22)"
LIMIT = "rgba(230, 159, 0, 0.75)"
BOUNDARY = "rgba(128, 136, 148, 0.55)"
NEUTRAL_TEXT = "#5b6470"
NEUTRAL_GRID = "rgba(128, 136, 148, 0.22)"

_RUN_COLOURS = ("#1F83CC", "#CC79A7", "#B8860B", "#56B4E9", "#8A8F98", "#D55E00", "#009E73")
_RUN_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")
_RUN_DASHES = ("solid", "dash", "dot", "dashdot")


def run_look(position: int, name: str) -> Look:
    """How the run at a position of the comparison is drawn; the report's own run is the first."""
    return Look(
        plain(name),
        _RUN_COLOURS[position % len(_RUN_COLOURS)],
        _RUN_DASHES[position % len(_RUN_DASHES)],
        _RUN_SYMBOLS[position % len(_RUN_SYMBOLS)],
    )


def getter(field: str) -> Callable[[Any], float | None]:
    """Reads one field of a record."""

    def get(item: Any) -> float | None:
        value: float | None = getattr(item, field)
        return value

    return get


def plain(text: str) -> str:
    """Text in which plotly finds no markup."""
    return escape(text, quote=False)


def line(look: Look, x: list[Any], y: list[Any], **more: Any) -> go.Scatter:
    """A line with markers in a look; missing values interrupt it."""
    options: dict[str, Any] = {
        "name": look.name,
        "legendgroup": look.name,
        "mode": "lines+markers",
        "line": {"color": look.colour, "dash": look.dash, "width": 2},
        "marker": {"symbol": look.symbol, "size": 8, "color": look.colour},
        "connectgaps": False,
    }
    return go.Scatter(x=x, y=y, **(options | more))


def finish(figure: go.Figure, height: int) -> go.Figure:
    """The layout that all figures share; the report's script adapts the neutral colours to a dark page."""
    font = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": NEUTRAL_TEXT}
    figure.update_layout(
        template="none",
        height=height,
        font=font,
        margin={"l": 64, "r": 16, "t": 56, "b": 52},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"},
        hovermode="x unified",
        hoverlabel={"font": {"size": 12}},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": BOUNDARY, "activecolor": NEUTRAL_TEXT},
    )
    axis = {
        "gridcolor": NEUTRAL_GRID,
        "zerolinecolor": NEUTRAL_GRID,
        "linecolor": NEUTRAL_GRID,
        "title_font": {"size": 13},
    }
    figure.update_xaxes(**axis, title_standoff=8)
    figure.update_yaxes(**axis, automargin=True)
    figure.update_annotations(font={"size": 13, "color": NEUTRAL_TEXT})
    return figure
