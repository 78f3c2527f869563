"""`tspin evaluate`: a checkpoint on the held-out examples."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tspin.cli.arguments import add_config, add_iteration, add_output, command_parser, config_of
from megatron_tspin.cli.ranks import enter_ranks
from megatron_tspin.errors import EXIT_OK

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_DESCRIPTION = """Evaluate a checkpoint on the held-out examples, as a run does after each iteration.

reads   the checkpoint --load and the held-out examples: data.held_out, or data.held_out_fraction of data.annotated
writes  the file --output: accuracy of greedy and sampled answers, and log-probs of the annotated ones

example
  tspin evaluate --config runs/first/run.yaml --load runs/first/initial/checkpoint --iteration 0 --output policy.json"""

_UNREAD = ("run_dir", "data.annotated", "objective", "optimizer", "self_play")


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "evaluate", "evaluate a checkpoint on held-out examples", _DESCRIPTION)
    parser.add_argument("--load", type=Path, required=True, metavar="CKPT", help="checkpoint of the policy")
    add_output(parser, "file to write", "FILE.json")
    add_iteration(parser, purpose="self-play iterations that the policy has behind it")
    add_config(parser, ("", "model", "data", "parallel", "generation", "evaluation"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    config = config_of(args, _UNREAD)
    if config.data.held_out_fraction > 0:
        config = config_of(args, [name for name in _UNREAD if name != "data.annotated"])
    enter_ranks(config.generation_layout())
    from megatron_tspin.generation.stages import evaluate_file

    evaluate_file(config, args.load, args.iteration, args.output, args.overwrite)
    return EXIT_OK
