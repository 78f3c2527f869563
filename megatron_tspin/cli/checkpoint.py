"""`tspin checkpoint`: looks at checkpoints without loading them."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tspin.checkpoint.manifest import verify_checkpoint
from megatron_tspin.cli.arguments import command_parser
from megatron_tspin.errors import EXIT_OK

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_DESCRIPTION = """Look at a checkpoint of this project without loading it.

reads   the checkpoint's folder
writes  nothing

example
  tspin checkpoint verify runs/first/iteration_001/checkpoint/step_00000012"""

_VERIFY_DESCRIPTION = """Compare every file of a checkpoint with its manifest: its size and its SHA-256.

Prints a line for each file that is missing or changed, and exits with 2 if there is one. Stages hash what they load
themselves; this is for checkpoints that were copied or kept for long.

reads   every file of the checkpoint
writes  nothing

example
  tspin checkpoint verify runs/first/iteration_001/checkpoint/step_00000012"""


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "checkpoint", "check the files of a checkpoint", _DESCRIPTION)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    verify = command_parser(actions, "verify", "compare all files with the manifest", _VERIFY_DESCRIPTION)
    verify.add_argument("folder", type=Path, metavar="FOLDER", help="folder with a manifest.json")
    verify.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    """Runs `tspin checkpoint verify`."""
    files = verify_checkpoint(args.folder)["files"]
    size = sum(facts["size"] for facts in files.values())
    sys.stdout.write(f"{args.folder}: whole, {len(files)} files, {size} bytes\n")
    return EXIT_OK
