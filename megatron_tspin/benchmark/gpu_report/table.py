"""The report as text of at most some hundred lines: a block a check, a line a case or a group of cases."""

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from megatron_tspin.benchmark.gpu_report.catalogue import BY_NAME
from megatron_tspin.benchmark.gpu_report.check import FAILED, OK, SKIPPED, Check, CheckResult, Outcome
from megatron_tspin.benchmark.tables import ABSENT, as_text, make_table

_REASON = 150
_HEADINGS = {
    "milliseconds": "ms",
    "forward_ms": "fwd ms",
    "first_seconds": "first s",
    "input_gradient": "d input",
    "weight_gradient": "d weight",
    "triplets_per_second": "tripl/s",
    "tokens_per_second": "tokens/s",
    "share_of_bf16": "of bf16",
    "tflops": "TFLOP/s",
    "peak_mib": "MiB",
    "peak_gib": "GiB",
    "rate": "T/s",
}


def render(results: Sequence[CheckResult], head: dict[str, Any]) -> str:
    """The text, with a line feed at its end."""
    kind = "reduced form: the figures say nothing about a GPU" if head["reduced"] else "full form"
    parts: list[RenderableType] = [f"GPU report of {head['date']}, {kind}, {head['seconds']:.0f} s"]
    for result in results:
        parts += _block(result, BY_NAME[result.name])
    counts = (f"{sum(result.status == status for result in results)} {status}" for status in (OK, FAILED, SKIPPED))
    return as_text(*parts, "checks: " + ", ".join(counts))


def _block(result: CheckResult, check: Check) -> list[RenderableType]:
    by_status = {status: [case for case in result.cases if case.status == status] for status in (OK, FAILED, SKIPPED)}
    counts = ", ".join(f"{len(cases)} {status}" for status, cases in by_status.items() if cases)
    parts: list[RenderableType] = [
        f"== {check.name}: {result.status}, {result.seconds:.0f} s ({counts or 'no case'}). {check.title}"
    ]
    measured = [case for case in by_status[OK] if _has_column(case, check)]
    parts += [_sentence(case) for case in by_status[OK] if case not in measured]
    if measured:
        parts.append(_across(measured, check.columns) if check.across else _down(measured, check.columns))
    parts += [line for status in (FAILED, SKIPPED) for line in _reasons(status, by_status[status])]
    return parts if result.reason is None else [*parts, _one_line(f"{result.name}: {result.reason}")]


def _has_column(case: Outcome, check: Check) -> bool:
    return any(isinstance(case.figures.get(column), float | int) for column in check.columns)


def _sentence(case: Outcome) -> Text:
    return Text(f"{case.name}: " + ", ".join(f"{name} {_number(value)}" for name, value in case.figures.items()))


def _down(cases: Sequence[Outcome], columns: Sequence[str]) -> Table:
    """A row a case."""
    shown = [column for column in columns if any(column in case.figures for case in cases)]
    rows = ([case.name, *(_number(case.figures.get(column)) for column in shown)] for case in cases)
    return make_table(["", *_headings(shown)], rows, ruled=False)


def _across(cases: Sequence[Outcome], columns: Sequence[str]) -> Table:
    """Cases are named `row | group`: a line for each row, and beside each other a table for each group."""
    figures = {tuple(case.name.split(" | ", 1)): case.figures for case in cases}
    rows, groups = (list(dict.fromkeys(key[place] for key in figures)) for place in (0, 1))
    beside = Table.grid(padding=(0, 1))
    tables = [make_table([""], ([row] for row in rows), ruled=False)]
    for group in groups:
        found = [figures.get((row, group), {}) for row in rows]
        lines = ([_number(each.get(column)) for column in columns] for each in found)
        tables.append(make_table(_headings(columns), lines, ruled=False, first_left=False))
    for table, title in zip(tables, [" ", *groups], strict=True):
        table.title, table.title_justify, table.min_width = title, "left", len(title) + 1
    beside.add_row(*tables)
    return beside


def _headings(columns: Sequence[str]) -> list[str]:
    return [_HEADINGS.get(column, column) for column in columns]


def _number(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return ABSENT if value is None else value
    magnitude = abs(value)
    if value and (magnitude < 1e-2 or magnitude >= 1e6):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.0f}" if magnitude >= 1000 else f"{value:.3g}"


def _reasons(status: str, cases: Sequence[Outcome]) -> list[str]:
    """One line for all cases with the same reason."""
    by_reason: dict[str, list[str]] = {}
    for case in cases:
        by_reason.setdefault(case.reason or "", []).append(case.name)
    return [
        _one_line(f"{status}: {names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {reason}")
        for reason, names in by_reason.items()
    ]


def _one_line(text: str) -> str:
    """On one line, which may be longer than a table's."""
    short = " ".join(text.split())
    return short if len(short) <= _REASON else short[: _REASON - 3] + "..."
