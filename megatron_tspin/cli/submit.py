"""`tspin submit`: the whole run as a Slurm job."""

import argparse
import sys
from typing import TYPE_CHECKING

from megatron_tspin.cli.arguments import add_config, command_parser, config_of
from megatron_tspin.errors import EXIT_OK

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_DESCRIPTION = """Submit a run to Slurm.

reads   what `tspin run` reads, and checks it before anything waits in a queue
writes  RUN_DIR/run.yaml and RUN_DIR/submit.sh, and prints the number of the job

The config's section `launch` says what the job asks for: nodes, GPUs of a node, time, partition, account, container,
and so on. Every stage is a step of the job. Before its time limit the job saves and queues itself again, until the run
is done; after scancel or bad input it never does.

example
  tspin submit --config run.yaml --run-dir runs/first --dry-run"""


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "submit", "the whole run as a Slurm job", _DESCRIPTION)
    parser.add_argument(
        "--dry-run", action="store_true", help="write the script and the resolved config, submit nothing"
    )
    add_config(parser, required=False)
    parser.set_defaults(run=run, drives=True)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from megatron_tspin.selfplay.submission import submit

    job = submit(config_of(args), args.dry_run)
    if job is not None:
        sys.stdout.write(f"{job}\n")
    return EXIT_OK
