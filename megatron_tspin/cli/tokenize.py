"""`tspin tokenize`: annotated examples become token documents."""

import argparse
from typing import TYPE_CHECKING

from megatron_tspin.cli.arguments import add_config, command_parser, config_of
from megatron_tspin.cli.ranks import only_writer
from megatron_tspin.errors import EXIT_OK

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_DESCRIPTION = """Turn annotated and held-out examples into indexed token documents (Megatron's .bin and .idx).

reads   data.annotated, data.held_out and the tokenizer
writes  RUN_DIR/data: train.jsonl, held_out.jsonl and a prompt and an annotated document of each

Runs in one process. Every line that cannot be used is reported with its number before anything is written.

example
  tspin tokenize --config run.yaml --annotated train.jsonl --seq-length 1024 --over-long drop"""


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "tokenize", "annotated examples to token documents", _DESCRIPTION)
    add_config(parser, ("", "model", "data"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    config = config_of(args)
    from megatron_tspin.data.tokenization import tokenize_run

    with only_writer(config):
        tokenize_run(config)
    return EXIT_OK
