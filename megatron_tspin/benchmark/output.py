"""The step benchmark's result: a table on stdout, a JSON file with every repetition, and a plot."""

from importlib.util import find_spec
from pathlib import Path

from megatron_tspin.benchmark.results import SideResult, StepResult
from megatron_tspin.benchmark.tables import ABSENT, make_table, show
from megatron_tspin.log import get_logger
from megatron_tspin.storage import write_json, write_text

_log = get_logger(__name__)
_COLUMNS = ("side", "triplets/s", "min..max", "tokens/s", "speedup", "by FLOPs", "peak MiB", "of matmul")
_MEANINGS = """\
tokens/s: response tokens; speedup: over transformers; by FLOPs: the speedup that the operations predict;
peak MiB: above weights and gradients; of matmul: the operations that the batch needs at least, per second, \
over the rate of matrix products"""


def write_result(result: StepResult, folder: Path) -> Path:
    """Writes the JSON file and, where plotly is installed, the plot beside it; returns the JSON file."""
    settings = result.settings
    what = f"{Path(settings.model).name}_{settings.lengths}_{settings.max_length}_mb{settings.micro_batch_size}"
    target = folder / f"step_{what}{'_bf16' * settings.bf16}.json"
    write_json(target, result.as_json())
    if find_spec("plotly") is None:  # as on a GPU machine that has no package index
        _log.warning("results: %s; without a plot, as plotly is not installed", target)
        return target
    from megatron_tspin.benchmark.figure import figure_page

    write_text(target.with_suffix(".html"), figure_page(result))
    _log.info("results: %s and .html", target)
    return target


def print_result(result: StepResult) -> None:
    """Prints the table; its last line is the speedup, if both sides of it were measured."""
    absent = [f"{side.name} is left out: {side.absent}" for side in result.sides if side.absent is not None]
    table = make_table(_COLUMNS, (_row(result, side) for side in result.sides))
    headline = result.headline()
    show(_title(result), _MEANINGS, table, *absent, *([] if headline is None else [headline]))


def _title(result: StepResult) -> str:
    settings, machine = result.settings, result.machine
    rounds = max((len(side.seconds) for side in result.sides), default=0)
    tokens = sum(map(sum, result.response_tokens))
    rate = max(result.matmul_flops_per_second, default=float("nan")) / 1e9
    return (
        f"One step, forward and backward, without the optimizer: {Path(settings.model).name}, "
        f"{'bf16' if settings.bf16 else 'fp32'}, {settings.triplets} triplets, {rounds} timed steps a side\n"
        f"lengths {settings.lengths} up to {settings.max_length}, {tokens} response tokens, "
        f"micro-batch {settings.micro_batch_size}, row capacity {settings.row_capacity}\n"
        f"{machine['cpu']}, {settings.threads} threads of {machine['cores']} cores, matrix products {rate:.0f} GFLOP/s"
    )


def _row(result: StepResult, side: SideResult) -> list[str]:
    predicted = _ratio(result.predicted_speedup(side))
    if not side.seconds:
        return [side.name, *[ABSENT] * 4, predicted, *[ABSENT] * 2]
    rate = result.triplets_per_second(side)
    return [
        side.name,
        f"{rate.median:.3g}",
        f"{rate.low:.3g}..{rate.high:.3g}",
        f"{result.response_tokens_per_second(side):.0f}",
        _ratio(result.speedup(side)),
        predicted,
        f"{max(side.peak_mib):.0f}",
        f"{result.useful_share_of_peak(side):.0%}",
    ]


def _ratio(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"
