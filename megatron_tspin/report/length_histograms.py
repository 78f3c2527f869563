"""How long prompts and responses are, from the indexes of the run's documents."""

from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from megatron_tspin.data.indexed import read_lengths
from megatron_tspin.errors import ArtifactError
from megatron_tspin.report import style
from megatron_tspin.report.run_data import RunData
from megatron_tspin.report.style import Figure
from megatron_tspin.run_folder import HELD_OUT, TRAIN, RunFolder, document_stem

_BINS = 40
_SPACING = 0.075

Lengths = NDArray[np.int64]


def histogram_figure(run: RunData) -> Figure | None:
    """Histograms of the tokens of prompts and responses; None before `tokenize` is done."""
    prompts, responses = prompt_lengths(run), response_lengths(run)
    if not prompts:
        return None
    figure = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=_SPACING,
        subplot_titles=("prompts", "responses"),
    )
    for column, looks in enumerate((prompts, responses), start=1):
        edges = _edges([lengths for _, lengths in looks])
        for look, lengths in looks:
            figure.add_trace(_outline(look, lengths, edges), row=1, col=column)
        figure.update_xaxes(title_text="tokens", row=1, col=column)
    figure.update_yaxes(title_text="share of documents", tickformat=".0%", rangemode="tozero", col=1)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero", col=2)
    longest = max(int(lengths.max()) for _, lengths in [*prompts, *responses])
    return Figure(
        "length-histograms",
        "Lengths of prompts and responses",
        f"Share of documents by tokens, what closes a response included; the longest has {longest}, "
        f"and prompt and response together may have {run.config.data.seq_length} (--seq-length). y' is that of the "
        "last iteration with answers; a peak at its right end are answers that were cut off.",
        style.finish(figure, 340),
    )


def prompt_lengths(run: RunData) -> list[tuple[style.Look, Lengths]]:
    """Tokens of each prompt, of training and held-out ones as far as there are any."""
    data = RunFolder(run.path).data
    looks = {TRAIN: style.Look("training prompts", "#7A6FA8", "solid", "circle"),
             HELD_OUT: style.Look("held-out prompts", "#8A8F98", "dash", "x")}  # fmt: skip
    return _known([(look, document_stem(data, split, "prompt")) for split, look in looks.items()])


def response_lengths(run: RunData) -> list[tuple[style.Look, Lengths]]:
    """Tokens of each response, of the roles as far as there are any."""
    folder = RunFolder(run.path)
    last = [item.index for item in run.iterations if item.synthetic is not None][-1:]
    stems = [(style.ROLES["annotated"], document_stem(folder.data, TRAIN, "annotated"))]
    stems += [
        (style.ROLES["synthetic"], document_stem(folder.iteration(number), TRAIN, "synthetic")) for number in last
    ]
    stems.append((style.ROLES["proto"], document_stem(folder.data, TRAIN, "proto")))
    return _known(stems)


def _known(stems: list[tuple[style.Look, Path]]) -> list[tuple[style.Look, Lengths]]:
    """Lengths of what is there; what is absent or damaged is for the stages to tell."""
    found = []
    for look, stem in stems:
        try:
            found.append((look, read_lengths(stem)))
        except ArtifactError:
            continue
    return found


def _edges(all_lengths: list[Lengths]) -> NDArray[np.float64]:
    """Borders of bins of whole numbers of tokens, the same for all."""
    highest = max((int(lengths.max()) for lengths in all_lengths), default=1)
    width = max(1, -(-(highest + 1) // _BINS))
    edges: NDArray[np.float64] = np.arange(0, highest + 1 + width, width, dtype=np.float64) - 0.5
    return edges


def _outline(look: style.Look, lengths: Lengths, edges: NDArray[np.float64]) -> go.Scatter:
    """A histogram's outline: the page holds a number a bin, not one a document."""
    counts, _ = np.histogram(lengths, edges)
    shares = counts / len(lengths)
    return style.line(
        look,
        edges.tolist(),
        [*shares.tolist(), 0.0],
        mode="lines",
        line={"color": look.colour, "dash": look.dash, "width": 2, "shape": "hv"},
        hovertemplate="%{y:.1%}",
    )
