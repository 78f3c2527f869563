"""`tspin convert`: an HF checkpoint becomes a megatron-core one."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tspin.cli.arguments import add_config, command_parser, config_of, layout_of, require
from megatron_tspin.cli.ranks import enter_ranks, only_writer
from megatron_tspin.config_source import overrides
from megatron_tspin.errors import EXIT_OK, InputError

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_PARITY_BOUND = 5e-6

_DESCRIPTION = """Convert an HF checkpoint (config.json, *.safetensors) to megatron-core's distributed format.

With --config it makes the initial policy of a run; without, it converts any checkpoint of a supported family.

reads   the HF checkpoint
writes  RUN_DIR/initial/checkpoint, or the folder --save; it loads under any TP x PP x DP

The converted model is compared with transformers in float64, layer by layer and on sequence log-probs; beyond the
bound nothing is written (exit code 4, which names the first layer that departs). What was compared, on what, and the
worst figures stand in verification.json, in the folder --save or in RUN_DIR/initial, and in the report of a run.

examples
  tspin convert --config runs/first/run.yaml
  torchrun --nproc-per-node 2 -m megatron_tspin convert --hf-checkpoint models/base --save models/base_core \\
      --tensor-model-parallel-size 2"""


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "convert", "HF checkpoint to megatron-core checkpoint", _DESCRIPTION)
    parser.add_argument("--save", type=Path, metavar="DIR", help="folder to write, without --config")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compare with transformers, without --config [True]",
    )
    parser.add_argument(
        "--verify-data", type=Path, metavar="FILE.jsonl", help="examples to compare on [built-in sentences]"
    )
    parser.add_argument(
        "--bound",
        type=float,
        metavar="X",
        help=f"largest relative difference of a sequence log-prob [{_PARITY_BOUND}]",
    )
    add_config(parser, ("", "model", "parallel"), required=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.config is not None:
        return _convert_for_run(args)
    require(args, model__hf_checkpoint="--hf-checkpoint", save="--save")
    verify = args.verify is not False
    if not verify and (args.verify_data is not None or args.bound is not None):
        raise InputError("--verify-data and --bound: of no use with --no-verify")
    layout = layout_of(args)
    enter_ranks(layout)
    from megatron_tspin.conversion.stages import convert_checkpoint

    hf_checkpoint = Path(overrides(args)["model.hf_checkpoint"])
    bound = _PARITY_BOUND if args.bound is None else args.bound
    convert_checkpoint(hf_checkpoint, args.save, layout, verify, args.verify_data, bound)
    return EXIT_OK


def _convert_for_run(args: argparse.Namespace) -> int:
    if any(value is not None for value in (args.verify, args.save, args.verify_data, args.bound)):
        raise InputError(
            "--save, --verify, --verify-data and --bound are for converting without a run; leave out --config (a run's "
            "config has model.verify_conversion)"
        )
    config = config_of(args)
    enter_ranks(config.parallel)
    from megatron_tspin.conversion.stages import convert_run

    with only_writer(config):
        convert_run(config)
    return EXIT_OK
