"""The report as text of at most some hundred lines: a block a check, a line a case or a group of cases."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_tspin.benchmark.gpu_report.case import FAILED, OK, SKIPPED, Outcome
from megatron_tspin.benchmark.gpu_report.catalogue import BY_NAME, Check
from megatron_tspin.benchmark.gpu_report.record import CheckResult

WIDTH = 132
_REASON = 150
_ABSENT = "-"
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
    lines = [f"GPU report of {head['date']}, {kind}, {head['seconds']:.0f} s"]
    for result in results:
        lines += _block(result, BY_NAME[result.name])
    counts = {status: sum(result.status == status for result in results) for status in (OK, FAILED, SKIPPED)}
    lines.append("checks: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    return "\n".join(lines) + "\n"


def _block(result: CheckResult, check: Check) -> list[str]:
    cases = {status: sum(case.status == status for case in result.cases) for status in (OK, FAILED, SKIPPED)}
    counts = ", ".join(f"{count} {status}" for status, count in cases.items() if count)
    lines = [f"== {check.name}: {result.status}, {result.seconds:.0f} s ({counts or 'no case'}). {check.title}"]
    good = [case for case in result.cases if case.status == OK]
    texts = [case for case in good if not _has_column(case, check.columns)]
    for case in texts:
        lines += textwrap.wrap(f"{case.name}: {_as_text(case)}", WIDTH)
    measured = [case for case in good if _has_column(case, check.columns)]
    if measured:
        lines += _aligned(_across(measured, check.columns) if check.across else _down(measured, check.columns))
    for status in (FAILED, SKIPPED):
        lines += _reasons(status, [case for case in result.cases if case.status == status])
    if result.reason is not None:
        lines.append(_one_line(f"{result.name}: {result.reason}"))
    return lines


def _has_column(case: Outcome, columns: Iterable[str]) -> bool:
    return any(isinstance(case.figures.get(column), float | int) for column in columns)


def _as_text(case: Outcome) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in case.figures.items())


def _down(cases: Sequence[Outcome], columns: Sequence[str]) -> list[list[str]]:
    """A row a case."""
    shown = [column for column in columns if any(column in case.figures for case in cases)]
    header = ["", *(_HEADINGS.get(column, column) for column in shown)]
    return [header, *([case.name, *(_number(case.figures.get(column)) for column in shown)] for case in cases)]


def _across(cases: Sequence[Outcome], columns: Sequence[str]) -> list[list[str]]:
    """Cases are named `row | column`: a row for each row, all figures of a column beside each other."""
    found: dict[str, dict[str, Outcome]] = {}
    groups: list[str] = []
    for case in cases:
        row, _, group = case.name.partition(" | ")
        found.setdefault(row, {})[group] = case
        groups += [group] * (group not in groups)
    titles, units = [""], [""]
    for group in groups:
        titles += [group, *[""] * (len(columns) - 1)]
        units += [_HEADINGS.get(column, column) for column in columns]
    rows = [
        [
            row,
            *(
                _number(by_group[group].figures.get(column) if group in by_group else None)
                for group in groups
                for column in columns
            ),
        ]
        for row, by_group in found.items()
    ]
    return [titles, units, *rows]


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns as wide as their numbers; a title may run over empty neighbours."""
    widths = [max((len(row[i]) for row in rows if not _is_title(row)), default=0) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        if _is_title(row):
            line = " " * widths[0]
            for i, text in enumerate(row[1:], start=1):
                line = line.ljust(sum(widths[:i]) + i) if text else line
                line += " " * bool(text) + text
        else:
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            line = " ".join(cells)
        lines.append(line.rstrip())
    return lines


def _is_title(row: list[str]) -> bool:
    """The first line of a table with groups: not every column has a text, and the first has none."""
    return row[0] == "" and "" in row[1:]


def _number(value: float | str | None) -> str:
    if value is None:
        return _ABSENT
    if isinstance(value, str):
        return value
    magnitude = abs(value)
    if value == 0:
        return "0"
    if magnitude < 1e-2 or magnitude >= 1e6:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.0f}" if magnitude >= 1000 else f"{value:.3g}"


def _reasons(status: str, cases: Sequence[Outcome]) -> list[str]:
    """One line for all cases with the same reason."""
    by_reason: dict[str, list[str]] = {}
    for case in cases:
        by_reason.setdefault(case.reason or "", []).append(case.name)
    return [_one_line(f"{status}: {_names(names)}: {reason}") for reason, names in by_reason.items()]


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _one_line(text: str) -> str:
    """On one line, which may be longer than a table's."""
    short = " ".join(text.split())
    return short if len(short) <= _REASON else short[: _REASON - 3] + "..."
