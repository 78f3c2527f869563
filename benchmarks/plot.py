"""Plots result files of `tspin bench step` again: `python benchmarks/plot.py benchmarks/results/step_*.json`."""

import sys
from collections.abc import Iterable
from pathlib import Path

from megatron_tspin.benchmark.figure import figure_page
from megatron_tspin.benchmark.results import read_result
from megatron_tspin.storage import write_text


def main(paths: Iterable[str]) -> None:
    """Writes an HTML file beside each JSON file."""
    for path in map(Path, paths):
        write_text(path.with_suffix(".html"), figure_page(read_result(path)))


if __name__ == "__main__":
    main(sys.argv[1:])
