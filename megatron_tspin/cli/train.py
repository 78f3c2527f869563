"""`tspin train`: one self-play iteration of training."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tspin.cli.arguments import add_config, add_iteration, command_parser, config_of
from megatron_tspin.cli.ranks import enter_ranks, only_writer
from megatron_tspin.errors import EXIT_OK

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_DESCRIPTION = """Train the policy on the triplets of one self-play iteration: a stage of a run.

reads   the token documents of RUN_DIR/data and RUN_DIR/iteration_N, and the policy after N iterations (or --load)
writes  RUN_DIR/iteration_N: metrics.jsonl (one line a step), tensorboard, checkpoint (or --save);
        reference.jsonl for the methods with a reference policy; precision.json in bf16 or FP8, or where vLLM
        answered: what that does to log-probs (--tspin-rescored-prompts)

Continues from the last whole checkpoint it wrote, to the same bytes.

example
  torchrun --nproc-per-node 2 -m megatron_tspin train --config runs/first/run.yaml --iteration 0 \\
      --tspin-data-parallel-size 2"""


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "train", "one self-play iteration of training", _DESCRIPTION)
    add_iteration(parser)
    parser.add_argument("--load", type=Path, metavar="DIR", help="checkpoint to start from [the run's own]")
    parser.add_argument("--save", type=Path, metavar="DIR", help="folder of the checkpoints to write [the run's own]")
    add_config(parser, ("", "objective", "optimizer", "training", "parallel"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    config = config_of(args)
    enter_ranks(config.parallel)
    from megatron_tspin.training.stages import train_run

    with only_writer(config):
        train_run(config, args.iteration, args.load, args.save)
    return EXIT_OK
