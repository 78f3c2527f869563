"""`tspin generate`: any checkpoint answers any prompts."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tspin.cli.arguments import (
    add_config,
    add_iteration,
    add_output,
    command_parser,
    config_of,
    positive_number,
)
from megatron_tspin.cli.ranks import enter_ranks
from megatron_tspin.errors import EXIT_OK

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_DESCRIPTION = """Sample one response, or several, to each prompt of a file.

reads   the checkpoint --load and the examples --prompts (`prompt`, or `messages`, of which --turns says what
        is answered, with all that comes before it, on each line; docs/data.md lists the formats)
writes  OUTPUT/shard_*.jsonl: id, token ids, log-prob of each token, whether the response ended, text; with several
        responses to a prompt the number of each but the first (`sample`)

The same prompt, seed and iteration give the same response under every layout and batch size.

example
  tspin generate --config runs/first/run.yaml --load runs/first/initial/checkpoint --prompts new.jsonl --output out"""

_UNREAD = (
    "run_dir", "data.annotated", "data.held_out", "data.held_out_fraction", "data.split_seed", "data.over_long",
    "objective", "optimizer", "self_play", "evaluation",
)  # fmt: skip


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "generate", "sample responses to the prompts of a file", _DESCRIPTION)
    parser.add_argument("--load", type=Path, required=True, metavar="CKPT", help="checkpoint of the policy")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="examples to answer")
    add_output(parser, "folder for the shards", "DIR")
    add_iteration(parser, default=0, purpose="iteration that keys the random numbers [0]")
    parser.add_argument(
        "--tspin-samples-per-prompt", type=positive_number, default=1, metavar="N", help="responses to each prompt [1]"
    )
    add_config(parser, ("", "model", "data", "parallel", "generation"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    config = config_of(args, _UNREAD)
    enter_ranks(config.generation_layout())
    from megatron_tspin.generation.stages import generate_file

    samples = args.tspin_samples_per_prompt
    generate_file(config, args.load, args.prompts, args.output, args.iteration, samples, args.overwrite)
    return EXIT_OK
