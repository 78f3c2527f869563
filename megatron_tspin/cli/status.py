"""`tspin status` and `tspin logs`: what a run does, from its folder."""

import argparse
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tspin.cli.arguments import command_parser, positive_number
from megatron_tspin.errors import EXIT_OK, InputError
from megatron_tspin.run_folder import RunFolder, beats_folder, rank_log
from megatron_tspin.selfplay.status import current_stage, describe_run, run_config

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_FOLLOW_SECONDS = 0.5

_STATUS_DESCRIPTION = """Say how far a run is: which stages are done, which one runs where, what its ranks do.

reads   the run's folder, and Slurm's queue if the run was submitted
writes  nothing

example
  tspin status runs/first"""

_LOGS_DESCRIPTION = """Print the end of what a stage of a run said: its own lines, or those of one rank's libraries.

reads   RUN_DIR/logs
writes  nothing

examples
  tspin logs runs/first                      the stage that runs, or is next
  tspin logs runs/first train_001 --follow
  tspin logs runs/first train_001 --rank 12"""


def add_parser(subparsers: "Subparsers") -> None:
    """Adds both commands."""
    status = command_parser(subparsers, "status", "how far a run is, and where it runs", _STATUS_DESCRIPTION)
    status.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of the run")
    status.set_defaults(run=run_status)
    logs = command_parser(subparsers, "logs", "the end of what a stage said", _LOGS_DESCRIPTION)
    logs.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of the run")
    logs.add_argument(
        "stage", nargs="?", metavar="STAGE", help="its name, as `tspin status` shows it [the current one]"
    )
    logs.add_argument("--rank", type=int, metavar="N", help="what this rank's libraries said on stderr")
    logs.add_argument("--lines", type=positive_number, default=40, metavar="N", help="how many [40]")
    logs.add_argument("--follow", action="store_true", help="go on printing what is added, until Ctrl-C")
    logs.set_defaults(run=run_logs)


def run_status(args: argparse.Namespace) -> int:
    """Runs `tspin status`."""
    for line in describe_run(run_config(args.run_dir)):
        sys.stdout.write(f"{line}\n")
    return EXIT_OK


def run_logs(args: argparse.Namespace) -> int:
    """Runs `tspin logs`."""
    stage = args.stage or current_stage(run_config(args.run_dir))
    path = RunFolder(args.run_dir).log(stage)
    if args.rank is not None:
        path = rank_log(beats_folder(path), args.rank)
    if not path.is_file():
        raise InputError(f"{path}: is not there; either {stage} has not begun, or it had nothing to say")
    with path.open(encoding="utf-8", errors="replace") as stream:
        sys.stdout.writelines(deque(stream, maxlen=args.lines))
        while args.follow:
            sys.stdout.flush()
            time.sleep(_FOLLOW_SECONDS)
            sys.stdout.write(stream.read())
    return EXIT_OK
