"""`tspin env`: what a bug report needs."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from megatron_tspin.cli.arguments import command_parser
from megatron_tspin.errors import EXIT_OK
from megatron_tspin.provenance import machine, place, settings_of_environment, versions

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_DESCRIPTION = """Print what a bug report needs: versions, commit, machine, and variables that change how ranks compute.

reads   this host
writes  nothing

example
  tspin env"""


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "env", "versions and machine, for bug reports", _DESCRIPTION)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    found = {"versions": versions(), "place": place(), "machine": machine(), "environment": settings_of_environment()}
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    return EXIT_OK
