"""`tspin report`: what a run did, as one HTML file."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tspin.cli.arguments import add_output, command_parser
from megatron_tspin.errors import EXIT_OK
from megatron_tspin.log import LOG_FILE_VARIABLE, get_logger
from megatron_tspin.run_folder import RunFolder
from megatron_tspin.storage import refuse_existing

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_DESCRIPTION = """Write a self-contained HTML report of a run, also of one that is still going on.

reads   RUN_DIR, and the runs named with --compare
writes  RUN_DIR/report.html, or the file --output

examples
  tspin report runs/first
  tspin report runs/tspin --compare runs/spin runs/sft --output comparison.html"""

logger = get_logger(__name__)


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "report", "HTML report of a run, or of several", _DESCRIPTION)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of the run")
    parser.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="RUN_DIR", help="other runs to set beside it"
    )
    add_output(parser, "file to write [RUN_DIR/report.html]", "FILE", required=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from megatron_tspin.report.html import write_report

    output = RunFolder(args.run_dir).report
    if args.output is not None and args.output.absolute() != output.absolute():  # the run's own is made again each time
        output = args.output
        refuse_existing(output, args.overwrite)
    write_report(args.run_dir, args.compare, output)
    if LOG_FILE_VARIABLE not in os.environ:  # the driver says it itself
        logger.info("report: %s", output)
    return EXIT_OK
