"""The benchmark's result as a table on stdout, a JSON file with every repetition, and a plot."""

import dataclasses
import sys
from importlib.util import find_spec
from pathlib import Path

from megatron_tspin.benchmark.results import SideResult, StepResult
from megatron_tspin.log import get_logger
from megatron_tspin.storage import write_json, write_text

_log = get_logger(__name__)
_ABSENT = "-"
_WIDTH = 110  # of the table, also where stdout is no terminal


def write_result(result: StepResult, folder: Path) -> Path:
    """Writes the JSON file and, where plotly is installed, the plot beside it; returns the JSON file."""
    settings = result.settings
    what = f"{Path(settings.model).name}_{settings.lengths}_{settings.max_length}_mb{settings.micro_batch_size}"
    stem = f"step_{what}{'_bf16' * settings.bf16}"
    target = folder / f"{stem}.json"
    write_json(target, as_json(result))
    if find_spec("plotly") is None:  # as on a GPU machine that has no package index
        _log.warning("results: %s; without a plot, as plotly is not installed", target)
        return target
    from megatron_tspin.benchmark.figure import figure_page

    write_text(folder / f"{stem}.html", figure_page(result))
    _log.info("results: %s and .html", target)
    return target


def as_json(result: StepResult) -> dict[str, object]:
    """The result with every repetition, and the numbers of the table. The folder of the model is cut to its name."""
    tree = dataclasses.asdict(result)
    tree["settings"]["model"] = Path(result.settings.model).name
    tree["settings"]["trl_path"] = None
    tree["includes_optimizer"] = False
    for side, known in zip(tree["sides"], result.sides, strict=True):
        if known.seconds:
            side["triplets_per_second"] = dataclasses.asdict(result.triplets_per_second(known))
            side["response_tokens_per_second"] = result.response_tokens_per_second(known)
            side["speedup"] = result.speedup(known)
            side["useful_share_of_peak"] = result.useful_share_of_peak(known)
        side["predicted_speedup"] = result.predicted_speedup(known)
    return {"benchmark": "triplet_step", **tree}


def print_result(result: StepResult) -> None:
    """Prints the table; its last line is the speedup, if both sides of it were measured."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False)
    console.width = max(console.width, _WIDTH)
    console.print("\n".join(_title(result)), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("side", no_wrap=True)
    for name in ("triplets/s", "min..max", "tokens/s", "speedup", "by FLOPs", "peak MiB", "of matmul"):
        table.add_column(name, justify="right", no_wrap=True)
    for side in result.sides:
        table.add_row(*_row(result, side))
    console.print(table)
    for side in result.sides:
        if side.absent is not None:
            console.print(f"{side.name} is left out: {side.absent}", soft_wrap=True)
    headline = result.headline()
    if headline is not None:
        console.print(headline)


def _title(result: StepResult) -> list[str]:
    settings, machine = result.settings, result.machine
    rounds = max((len(side.seconds) for side in result.sides), default=0)
    tokens = sum(map(sum, result.response_tokens))
    rate = max(result.matmul_flops_per_second, default=float("nan")) / 1e9
    return [
        f"One step, forward and backward, without the optimizer: {Path(settings.model).name}, "
        f"{'bf16' if settings.bf16 else 'fp32'}, {settings.triplets} triplets, {rounds} timed steps a side",
        f"lengths {settings.lengths} up to {settings.max_length}, {tokens} response tokens, "
        f"micro-batch {settings.micro_batch_size}, row capacity {settings.row_capacity}",
        f"{machine['cpu']}, {settings.threads} threads of {machine['cores']} cores, matrix products {rate:.0f} GFLOP/s",
        "tokens/s: response tokens; speedup: over transformers; by FLOPs: the speedup that the operations predict;",
        "peak MiB: above weights and gradients; of matmul: the operations that the batch needs at least, per second, "
        "over the rate of matrix products",
    ]


def _row(result: StepResult, side: SideResult) -> list[str]:
    predicted = _number(result.predicted_speedup(side), "{:.2f}")
    if not side.seconds:
        return [side.name, *[_ABSENT] * 4, predicted, *[_ABSENT] * 2]
    rate = result.triplets_per_second(side)
    return [
        side.name,
        f"{rate.median:.3g}",
        f"{rate.low:.3g}..{rate.high:.3g}",
        f"{result.response_tokens_per_second(side):.0f}",
        _number(result.speedup(side), "{:.2f}"),
        predicted,
        f"{max(side.peak_mib):.0f}",
        f"{result.useful_share_of_peak(side):.0%}",
    ]


def _number(value: float | None, form: str) -> str:
    return _ABSENT if value is None else form.format(value)
