"""`tspin export`: a megatron-core checkpoint becomes an HF one."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tspin.cli.arguments import add_config, add_files, command_parser, config_of, dtype_of, layout_of, require
from megatron_tspin.cli.ranks import enter_ranks, only_writer
from megatron_tspin.config_source import overrides
from megatron_tspin.errors import EXIT_OK, InputError

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_DESCRIPTION = """Export a policy as an HF checkpoint (config.json, *.safetensors, tokenizer) that transformers loads.

With --config it exports the final policy of a run; without, any checkpoint of this project.

reads   the checkpoint, and the HF checkpoint it came from (for config.json and the tokenizer)
writes  RUN_DIR/export/hf, or the folder --save

examples
  tspin export --config runs/first/run.yaml
  tspin export --load runs/first/iteration_001/checkpoint/step_00000012 --hf-checkpoint models/base --save out \\
      --dtype bfloat16 --shard-size 5GB"""


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "export", "megatron-core checkpoint to HF checkpoint", _DESCRIPTION)
    parser.add_argument("--load", type=Path, metavar="CKPT", help="checkpoint to export, without --config")
    parser.add_argument("--save", type=Path, metavar="DIR", help="folder to write, without --config")
    add_files(parser)
    add_config(parser, ("", "model", "parallel"), required=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.config is not None:
        return _export_for_run(args)
    require(args, load="--load", model__hf_checkpoint="--hf-checkpoint", save="--save")
    layout = layout_of(args)
    enter_ranks(layout)
    from megatron_tspin.conversion.stages import export_checkpoint

    source = Path(overrides(args)["model.hf_checkpoint"])
    export_checkpoint(args.load, source, args.save, layout, dtype_of(args), args.shard_size)
    return EXIT_OK


def _export_for_run(args: argparse.Namespace) -> int:
    if any(value is not None for value in (args.load, args.save, args.dtype, args.shard_size)):
        raise InputError("--load, --save, --dtype and --shard-size are for exporting without a run; leave out --config")
    config = config_of(args)
    enter_ranks(config.parallel)
    from megatron_tspin.conversion.stages import export_run

    with only_writer(config):
        export_run(config)
    return EXIT_OK
