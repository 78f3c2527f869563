"""`tspin tokenize`: annotated examples become token documents."""

import argparse
from typing import TYPE_CHECKING

from megatron_tspin.cli.arguments import add_config, command_parser, config_of, positive_number
from megatron_tspin.cli.ranks import only_writer
from megatron_tspin.config import Config
from megatron_tspin.errors import EXIT_OK

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_DESCRIPTION = """Turn annotated and held-out examples into indexed token documents (Megatron's .bin and .idx).

reads   data.annotated, data.held_out and the tokenizer
writes  RUN_DIR/data: train.jsonl, held_out.jsonl and a prompt and an annotated document of each

Runs in one process. Every line that cannot be used is reported with its number before anything is written. --preview
shows what examples become, token by token, and writes nothing.

examples
  tspin tokenize --config run.yaml --annotated train.jsonl --seq-length 1024 --over-long drop
  tspin tokenize --config run.yaml --preview 3"""


_COLOURS = {"prompt": "cyan", "response": "green"}


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "tokenize", "annotated examples to token documents", _DESCRIPTION)
    parser.add_argument("--preview", type=positive_number, metavar="N", help="show the first N examples and stop")
    add_config(parser, ("", "model", "data"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    config = config_of(args)
    if args.preview is not None:
        _show(config, args.preview)
        return EXIT_OK
    from megatron_tspin.data.tokenization import tokenize_run

    with only_writer(config):
        tokenize_run(config)
    return EXIT_OK


def _in_brackets(text: str) -> str:
    """A special token, visible also where there are no colours."""
    return f"\u27e6{text}\u27e7"


def _show(config: Config, count: int) -> None:
    """Prints prompts and responses as token texts, each with its id: a colour a part, special tokens in brackets."""
    from rich.console import Console
    from rich.text import Text

    from megatron_tspin.data.preview import preview

    console = Console(highlight=False)
    legend = Text("tokens with their ids: ").append("prompt", style=_COLOURS["prompt"]).append(", ")
    legend.append("response", style=_COLOURS["response"]).append(", ")
    console.print(legend.append(_in_brackets("special token"), style="reverse"))
    for identifier, tokens in preview(config, count):
        console.print(Text(f"example {identifier}", style="bold"))
        for part in ("prompt", "response"):
            chosen = [token for token in tokens if token.part == part]
            console.print(Text(f"  {part}, {len(chosen)} tokens"))
            line = Text("    ")
            for token in chosen:
                shown, style = repr(token.text)[1:-1], f"{_COLOURS[part]} underline"
                if token.special:
                    shown, style = _in_brackets(shown), f"{_COLOURS[part]} reverse"
                line.append(shown, style=style)
                line.append(f" {token.id}  ", style="dim")
            console.print(line)
        closing = tokens[-1]
        console.print(f"  closed by {closing.text!r} ({closing.id})\n", markup=False)
