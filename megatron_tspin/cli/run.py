"""`tspin run`: the whole run."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tspin.cli.arguments import add_config, command_parser, config_of
from megatron_tspin.selfplay import driver

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_DESCRIPTION = """Fine-tune an HF checkpoint by self-play on annotated answers, from start to report.

reads   the HF checkpoint (--hf-checkpoint), annotated examples (--annotated) and held-out examples (--held-out)
writes  --run-dir: run.yaml, token documents, sampled responses, checkpoints, metrics and evaluations of every
        iteration, the final policy as an HF checkpoint in export/hf, and report.html
stages  tokenize, convert, then rollout and train in turn, export, report; each in processes of its own

Whatever interrupts it, the same command continues the run. Settings that affect its results need another --run-dir;
layout, batch sizes, recompute and the like may change whenever it is continued, and --tspin-iterations may be raised.

example
  tspin run --config run.yaml --run-dir runs/first --hf-checkpoint models/base --annotated train.jsonl --dry-run"""


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "run", "the whole run, from HF checkpoint to report", _DESCRIPTION)
    parser.add_argument("--dry-run", action="store_true", help="check the input, print every stage's command and stop")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="make again what of finished stages is damaged; with --dry-run only say it",
    )
    add_config(parser, required=False)
    parser.set_defaults(run=run, drives=True)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    config = config_of(args)
    return driver.run(config, dry_run=args.dry_run, on_iteration=show_iterations, repair=args.repair)


def show_iterations(run_dir: Path) -> None:
    """Prints the table of all iterations so far."""
    from rich.console import Console

    from megatron_tspin.report.run_data import load_run
    from megatron_tspin.report.tables import render_terminal

    console = Console(stderr=True)
    console.print()
    render_terminal(load_run(run_dir), console)
