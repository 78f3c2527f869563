"""`tspin doctor`: whether the nodes can do what a run wants of them."""

import argparse
from typing import TYPE_CHECKING

from megatron_tspin.cli.arguments import add_config, command_parser, config_of
from megatron_tspin.cli.ranks import enter_ranks
from megatron_tspin.errors import EXIT_OK
from megatron_tspin.selfplay import driver

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_DESCRIPTION = """Examine the nodes of a run, in seconds: every job of `tspin submit` begins with it.

reads   the run's config, and what its nodes tell of themselves
writes  RUN_DIR/doctor

Starts as many ranks as the largest stage has, by the configured launcher, and compares versions, code, config, clocks
and settings of all nodes; the run's folder as each sees, writes and locks it; GPUs, their memory and their arithmetic;
and measures the run's own groups of ranks. A line a failure: node, what, remedy; exit code 2.

example
  tspin doctor --config run.yaml"""


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "doctor", "whether the nodes can do what a run wants", _DESCRIPTION)
    parser.add_argument("--as-rank", dest="drives", action="store_false", default=True, help=argparse.SUPPRESS)
    add_config(parser, required=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command, or what each rank of it does."""
    config = config_of(args)
    if args.drives:
        return driver.examine_nodes(config)
    enter_ranks(config.largest_layout())
    from megatron_tspin.doctor.ranks import examine

    examine(config)
    return EXIT_OK
