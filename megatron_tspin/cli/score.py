"""`tspin score`: log-probs of given responses."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tspin.cli.arguments import add_config, add_output, command_parser, config_of
from megatron_tspin.cli.ranks import enter_ranks
from megatron_tspin.errors import EXIT_OK

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_DESCRIPTION = """Write the log-prob of each response of a file under a checkpoint.

reads   the checkpoint --load and the examples --data (on each line `prompt` and `response`, or `messages`, of which
        --turns says what is scored, or `prompt_ids` and `response_ids`; docs/data.md lists the formats)
writes  the file --output, one line an example: id, log_prob (sum over the response, EOS included), num_tokens

example
  tspin score --config runs/first/run.yaml --load runs/first/initial/checkpoint --data new.jsonl --output out.jsonl"""

_UNREAD = (
    "run_dir", "data.annotated", "data.held_out", "data.held_out_fraction", "data.split_seed", "data.over_long",
    "objective", "optimizer", "generation", "self_play", "evaluation",
)  # fmt: skip


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "score", "log-probs of the responses of a file", _DESCRIPTION)
    parser.add_argument("--load", type=Path, required=True, metavar="CKPT", help="checkpoint of the policy")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="examples to score")
    add_output(parser, "file to write", "FILE.jsonl")
    add_config(parser, ("", "model", "data", "training", "parallel"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    config = config_of(args, _UNREAD)
    enter_ranks(config.parallel)
    from megatron_tspin.training.stages import score_file

    score_file(config, args.load, args.data, args.output, args.overwrite)
    return EXIT_OK
