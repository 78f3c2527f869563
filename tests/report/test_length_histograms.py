from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tspin.data.indexed import write_documents
from megatron_tspin.report.length_histograms import histogram_figure
from megatron_tspin.report.run_data import load_run
from megatron_tspin.run_folder import HELD_OUT, TRAIN, RunFolder, document_stem, file_of


def test_shares_of_documents_by_length(build_run: Callable[..., Path]) -> None:
    folder = build_run()
    data, first = RunFolder(folder).data, RunFolder(folder).iteration(0)
    assert histogram_figure(load_run(folder)) is None  # nothing is tokenized
    write_documents(document_stem(data, TRAIN, "prompt"), [[1] * 3, [1] * 3, [1] * 5, []], 10, {})
    write_documents(document_stem(data, HELD_OUT, "prompt"), [[1] * 200], 10, {})
    write_documents(document_stem(data, TRAIN, "annotated"), [[1], [1] * 2, [1] * 2, [1] * 2], 10, {})
    write_documents(document_stem(first, TRAIN, "synthetic"), [[1]] * 4, 10, {})
    figure = histogram_figure(load_run(folder))
    assert figure is not None and "the longest has 200" in figure.caption
    traces = {trace.name: trace for trace in figure.plot.data}
    assert {"training prompts", "held-out prompts", "y (annotated)"} <= set(traces)
    train = traces["training prompts"]
    assert sum(train.y) == pytest.approx(1) and len(train.x) == len(train.y) <= 42
    answers = traces["y (annotated)"]
    assert dict(zip(answers.x, answers.y, strict=True)) == {-0.5: 0, 0.5: 0.25, 1.5: 0.75, 2.5: 0}
    file_of(document_stem(data, TRAIN, "annotated"), "idx").write_bytes(b"torn")
    damaged = histogram_figure(load_run(folder))
    assert damaged is not None and "y (annotated)" not in {trace.name for trace in damaged.plot.data}
