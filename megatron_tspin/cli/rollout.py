"""`tspin rollout`: the policy of an iteration answers."""

import argparse
from typing import TYPE_CHECKING

from megatron_tspin.cli.arguments import add_config, add_iteration, command_parser, config_of
from megatron_tspin.cli.ranks import enter_ranks, only_writer
from megatron_tspin.errors import EXIT_OK

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_DESCRIPTION = """Let the policy after N self-play iterations answer: a stage of a run.

reads   RUN_DIR/data and the policy's checkpoint (N = 0: the initial policy)
writes  RUN_DIR/evaluation/policy_N.json, its answers to the held-out prompts;
        RUN_DIR/iteration_N/synthetic, its answers y' to the training prompts, and their token documents;
        RUN_DIR/proto, the initial policy's answers y0 (N = 0)

Answers that are already there are kept: after an interruption only missing shards are sampled.

example
  tspin rollout --config runs/first/run.yaml --iteration 0"""


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "rollout", "sample and evaluate the policy of an iteration", _DESCRIPTION)
    add_iteration(parser)
    add_config(parser, ("", "parallel", "generation", "evaluation"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    config = config_of(args)
    enter_ranks(config.generation_layout())
    from megatron_tspin.generation.stages import rollout_run

    with only_writer(config):
        rollout_run(config, args.iteration)
    return EXIT_OK
