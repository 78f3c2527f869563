"""`tspin quickstart`: the embedded example, once per method, and their comparison."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from megatron_tspin.cli.arguments import command_parser
from megatron_tspin.cli.run import show_iterations
from megatron_tspin.config import Config, Method
from megatron_tspin.config_source import load_config, read_yaml
from megatron_tspin.errors import EXIT_OK, InputError
from megatron_tspin.log import get_logger
from megatron_tspin.selfplay import driver
from megatron_tspin.selfplay.run_config import with_absolute_paths

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_DESCRIPTION = """Fine-tune the embedded example with T-SPIN, with SPIN and by SFT, and compare them.

Everything it needs is in the checkout: a tiny policy, its tokenizer, examples and a scorer. It runs on two CPU cores.

reads   examples/quickstart: run.yaml, and for each method the settings that differ
writes  FOLDER/<method>, a run each, and FOLDER/report.html, which compares them

example
  tspin quickstart --folder runs/quickstart --methods tspin sft"""

_MEASURES = {
    "objective": "objective",
    "iterations": "iterations done",
    "before": "start: accuracy (%), sampled",
    "sampled": "accuracy (%), sampled",
    "greedy": "accuracy (%), greedy",
    "nll": "NLL per token of y",
    "ended": "answers that end, sampled",
    "hours": "time",
}

logger = get_logger(__name__)


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "quickstart", "the embedded example, on a laptop", _DESCRIPTION)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/quickstart"),
        metavar="DIR",
        help="where the runs go [runs/quickstart]",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=get_args(Method),
        default=["tspin", "spin", "sft"],
        help="objectives to run; the report is about the first [tspin spin sft]",
    )
    parser.set_defaults(run=run, drives=True)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    example, methods = example_folder(), list(dict.fromkeys(args.methods))
    configs = [method_config(example, method, args.folder) for method in methods]
    for config in configs:
        driver.run(config, on_iteration=show_iterations)
    _compare([Path(config.run_dir) for config in configs], args.folder / "report.html")
    return EXIT_OK


def example_folder() -> Path:
    """`examples/quickstart` of the checkout that this package belongs to.

    Raises:
        InputError: The package was installed without its checkout.
    """
    folder = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
    if not (folder / "run.yaml").is_file():
        raise InputError(
            f"{folder}: no run.yaml there; the quickstart needs the project's checkout, use pip install -e ."
        )
    return folder


def method_config(example: Path, method: str, folder: Path) -> Config:
    """The example's config for one method; relative paths in it are taken from the checkout.

    Args:
        example: Folder with run.yaml and `<method>.yaml`, a flat mapping of dotted settings.
        method: The objective.
        folder: Where the runs go.

    Raises:
        InputError: A file is missing or a setting is refused.
    """
    overrides: dict[str, Any] = {"objective.method": method, **read_yaml(example / f"{method}.yaml")}
    overrides["run_dir"] = str((folder / method).absolute())
    return with_absolute_paths(load_config(example / "run.yaml", overrides), example.parents[1])


def _compare(run_dirs: Sequence[Path], output: Path) -> None:
    """Writes the comparing report and prints where things are."""
    from rich.console import Console

    from megatron_tspin.report.html import write_report

    write_report(run_dirs[0], run_dirs[1:], output)
    console = Console(file=sys.stdout, highlight=False)
    _print_table(run_dirs, console)
    console.print(f"Report: {output.absolute()}", soft_wrap=True)
    console.print(f"Fine-tuned HF checkpoint: {run_dirs[0] / 'export' / 'hf'}", soft_wrap=True)


def _print_table(run_dirs: Sequence[Path], console: Any) -> None:
    """One column a run, so that it fits into 80 columns."""
    from rich import box
    from rich.table import Table

    from megatron_tspin.report.headline import compare_runs
    from megatron_tspin.report.run_data import load_run

    first, *others = [load_run(run_dir) for run_dir in run_dirs]
    compared = compare_runs(first, others)
    table = Table(title="Held-out examples", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for run in compared:
        table.add_column(run.name, justify="right")
    for field, label in _MEASURES.items():
        table.add_row(label, *(getattr(run, field) for run in compared))
    table.add_row(f"sampled, against {first.name}", *(run.against for run in compared))
    console.print()
    console.print(table)
