"""Tables and sentences of the benchmarks as plain text."""

import io
import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

WIDTH = 132
ABSENT = "-"


def make_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], ruled: bool = True, first_left: bool = True
) -> Table:
    """A table of numbers, whose cells are never wrapped.

    Args:
        columns: Their headings.
        rows: As many cells each.
        ruled: A line below the headings, and empty lines around the table.
        first_left: The first column holds names, on the left; numbers are on the right.
    """
    table = Table(box=box.SIMPLE_HEAD if ruled else None, pad_edge=ruled, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if first_left and number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def as_text(*parts: RenderableType) -> str:
    """The parts below each other, with a line feed at the end. Strings keep to their lines, however long."""
    stream = io.StringIO()
    console = Console(file=stream, width=WIDTH, highlight=False, markup=False, color_system=None)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
    return "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())


def show(*parts: RenderableType) -> None:
    """Writes the parts to stdout."""
    sys.stdout.write(as_text(*parts))
    sys.stdout.flush()
