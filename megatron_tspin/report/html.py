"""The report of a run: one HTML file that needs no network and holds no trace of where it was made."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from megatron_tspin.config_source import settings
from megatron_tspin.report.figures import all_figures
from megatron_tspin.report.headline import (
    compare_runs,
    describe_objective,
    differing_data,
    duration,
    headline,
    tiles,
)
from megatron_tspin.report.run_data import RunData, load_run
from megatron_tspin.report.samples import load_samples
from megatron_tspin.report.style import Figure
from megatron_tspin.report.tables import ABSENT, iteration_rows, measures_with_values
from megatron_tspin.report.warnings import find_warnings
from megatron_tspin.run_folder import RunFolder
from megatron_tspin.storage import write_text


@dataclass(frozen=True)
class SettingLine:
    """One setting of the run."""

    name: str
    value: str
    default: str
    is_changed: bool
    description: str


def write_report(run_dir: Path, compare: Sequence[Path] = (), output: Path | None = None) -> Path:
    """Writes the report of a run, finished or not.

    Args:
        run_dir: The run.
        compare: Other runs on the same data, shown beside it.
        output: The file to write. Default: report.html in the run directory.

    Returns:
        The file written.

    Raises:
        InputError: A folder is not a run directory.
    """
    run, others = load_run(run_dir), [load_run(path) for path in compare]
    target = output or RunFolder(run_dir).report
    write_text(target, render(run, others))
    return target


def render(run: RunData, others: Sequence[RunData] = ()) -> str:
    """The report as HTML text, valid UTF-8 whatever the prompts contain."""
    environment = Environment(
        loader=PackageLoader("megatron_tspin.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters["code"] = _code
    rows = iteration_rows(run)
    samples = load_samples(run)
    figures = {figure.key: figure for figure in all_figures(run, others)}
    measures = groupby(measures_with_values(rows), key=lambda measure: measure.group)
    lines = setting_lines(run)
    return environment.get_template("report.html").render(
        run=run,
        objective=describe_objective(run.config),
        headline=headline(run),
        tiles=tiles(run),
        absent=ABSENT,
        warnings=find_warnings(run),
        compared=compare_runs(run, others) if others else [],
        differing=differing_data(run, others),
        figures=figures,
        rows=rows,
        measures=[(group, list(members)) for group, members in measures],
        samples=samples,
        changed=[line for line in lines if line.is_changed],
        unchanged=[line for line in lines if not line.is_changed],
        versions=versions(run),
        notes=notes(run),
        problems=[*run.problems, *(problem for item in others for problem in item.problems)],
        total=duration(sum(stage.seconds for stage in run.stages)),
        plotly=Markup(get_plotlyjs()),
        figure_json=_figure_json,
    )


def setting_lines(run: RunData) -> list[SettingLine]:
    """Every setting with its default; a required one has none and counts as changed."""
    tree = run.config.model_dump()
    lines = []
    for item in settings():
        value: Any = tree
        for part in item.path:
            value = value[part]
        required = item.field.is_required()
        default = "required" if required else _setting_text(item.field.default)
        is_changed = required or value != item.field.default
        lines.append(SettingLine(item.name, _setting_text(value), default, is_changed, item.field.description or ""))
    return lines


def versions(run: RunData) -> list[tuple[str, str]]:
    """Software versions that the stages recorded; where stages differ, which had what."""
    seen: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for stage in run.stages:
        for package, version in stage.versions.items():
            seen[package][str(version)].append(stage.stage)
    lines = []
    for package, by_version in sorted(seen.items()):
        if len(by_version) == 1:
            lines.append((package, next(iter(by_version))))
        else:
            lines.append((package, "; ".join(f"{name} in {', '.join(where)}" for name, where in by_version.items())))
    return lines


def notes(run: RunData) -> list[str]:
    """Where the run stands and where its results are."""
    missing = run.missing_stages()
    if missing:
        stand = f"The run is not finished: {missing[0]} is next, {len(missing)} stages are missing. " + (
            f"`tspin run --config {run.path.name}/run.yaml` continues it and redoes nothing that is done."
        )
    else:
        stand = "The run is finished. The final policy is in export/hf."
    found = [stand]
    restarted = [item.index for item in run.iterations if not item.steps]
    if restarted:
        found.append(f"No optimizer step is recorded yet in iteration {', '.join(map(str, restarted))}.")
    if not run.config.evaluation.scorer and run.config.data.has_held_out:
        found.append("No scorer is set (evaluation.scorer), so there is no accuracy, only likelihoods and lengths.")
    if not run.config.data.has_held_out:
        found.append("No held-out examples are set (data.held_out), so nothing here was measured on unseen prompts.")
    return found


def _setting_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _figure_json(figure: Figure) -> Markup:
    """A figure's JSON, safe inside a script element."""
    text = str(figure.plot.to_json())
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _code(text: str) -> Markup:
    """Text with `names in backticks` as code, escaped."""
    parts = str(_printable(text)).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if position % 2 else part for position, part in enumerate(parts)
    )


def _printable(value: Any) -> Any:
    """Text of users with control characters made visible and lone surrogates replaced; everything else unchanged."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    visible = "".join(chr(0x2400 + ord(char)) if char < " " and char not in "\n\t" else char for char in value)
    return visible.encode("utf-8", "replace").decode("utf-8")
