"""The generation benchmark's result: a table on stdout, a JSON file with every measurement, and a plot."""

from importlib.util import find_spec
from pathlib import Path

from megatron_tspin.benchmark.answers.results import AnswerResult, EngineResult
from megatron_tspin.benchmark.answers.settings import TRANSFORMERS, Workload
from megatron_tspin.benchmark.tables import ABSENT, make_table, show
from megatron_tspin.log import get_logger
from megatron_tspin.storage import write_json, write_text

_log = get_logger(__name__)
_COLUMNS = ("workload", "engine", "tokens/s", "min..max", "seconds", "tokens", "speedup", "peak MiB", "of matmul")
_MEANINGS = """\
tokens/s: new tokens, the prompts' time included; seconds: from the first prompt to the last answer; speedup: over
transformers' generate; peak MiB: above the loaded policy; of matmul: the operations that the answers need at least,
per second, over the rate of matrix products"""


def write_result(result: AnswerResult, folder: Path) -> Path:
    """Writes the JSON file and, where plotly is installed, the plot beside it; returns the JSON file."""
    target = folder / f"generate_{Path(result.settings.model).name}.json"
    write_json(target, result.as_json())
    if find_spec("plotly") is None:  # as on a GPU machine that has no package index
        _log.warning("results: %s; without a plot, as plotly is not installed", target)
        return target
    from megatron_tspin.benchmark.answers.figure import figure_page

    write_text(target.with_suffix(".html"), figure_page(result))
    _log.info("results: %s and .html", target)
    return target


def print_result(result: AnswerResult) -> None:
    """Prints the table; its last line is the speedup, if both sides of it were measured."""
    items = result.engines.items()
    absent = [
        f"{workload.name}: {name} is left out: {engine.absent}"
        for (workload, name), engine in items
        if engine.absent is not None
    ]
    table = make_table(_COLUMNS, (_row(result, workload, engine) for (workload, _), engine in items))
    headline = result.headline()
    show(_title(result), _MEANINGS, table, *absent, *([] if headline is None else [headline]))


def _title(result: AnswerResult) -> str:
    settings, machine = result.settings, result.machine
    rate = max(result.matmul_flops_per_second, default=float("nan")) / 1e9
    lengths = [len(prompt) for prompt in settings.prompts]
    return (
        f"Answers of {Path(settings.model).name} in fp32, sampled at temperature 1, up to {settings.new_tokens} "
        f"tokens, to prompts of {min(lengths)} to {max(lengths)} tokens\n"
        f"{machine['cpu']}, {settings.threads} threads of {machine['cores']} cores, matrix products {rate:.0f} GFLOP/s"
    )


def _row(result: AnswerResult, workload: Workload, engine: EngineResult) -> list[str]:
    rate = engine.tokens_per_second
    if rate is None:
        return [workload.name, engine.name, *[ABSENT] * 7]
    rates = [each.tokens_per_second for each in engine.measurements]
    # The row shows one measurement whole, not a median of each column.
    shown = min(engine.measurements, key=lambda each: abs(each.tokens_per_second - rate))
    over = result.engines.get((workload, TRANSFORMERS))
    baseline = None if over is None else over.tokens_per_second
    return [
        workload.name,
        engine.name,
        f"{rate:.1f}",
        f"{min(rates):.1f}..{max(rates):.1f}",
        f"{shown.seconds:.1f}",
        f"{sum(shown.tokens)}",
        ABSENT if baseline is None else f"{rate / baseline:.2f}",
        f"{max(each.peak_mib for each in engine.measurements):.0f}",
        f"{result.share_of_matmul(workload, shown):.0%}",
    ]
