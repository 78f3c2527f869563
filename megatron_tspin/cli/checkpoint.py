"""`tspin checkpoint`: looks at checkpoints of both kinds, and makes new ones of them, without building a model."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tspin.checkpoint.manifest import verify_checkpoint
from megatron_tspin.cli.arguments import add_files, command_parser, dtype_of, positive_number
from megatron_tspin.errors import EXIT_FAILED, EXIT_OK, InputError
from megatron_tspin.storage import refuse_existing_folder

if TYPE_CHECKING:
    from megatron_tspin.cli.arguments import Subparsers

_DESCRIPTION = """Look at checkpoints, and make new ones of them: HF folders and distributed ones of this project alike.

One tensor is in memory at a time, no model is built, and one process does it, whatever layout wrote the checkpoint.

reads   the checkpoints
writes  the folder --save (reshard, average); nothing (info, verify, diff)

examples
  tspin checkpoint info runs/first/iteration_001/checkpoint/step_00000012
  tspin checkpoint verify models/base
  tspin checkpoint diff models/base runs/first/export/hf"""

_INFO_DESCRIPTION = """Say what a checkpoint is: family, parameters, types, layout, step, source, digest.

reads   headers and manifest; with --digests all of an HF folder
writes  nothing

examples
  tspin checkpoint info models/base --digests
  tspin checkpoint info runs/first/initial/checkpoint --json"""

_VERIFY_DESCRIPTION = """Say whether a checkpoint is whole.

Of a distributed checkpoint every file is compared with the manifest: its size and its SHA-256. Of an HF folder the
tensors are compared with config.json and with the index, and every value has to be finite. Prints a line for each
problem, and exits with 2 if there is one. Stages hash what they load themselves; this is for checkpoints that were
copied, downloaded or kept for long.

reads   every file of the checkpoint
writes  nothing

examples
  tspin checkpoint verify runs/first/iteration_001/checkpoint/step_00000012
  tspin checkpoint verify models/base"""

_RESHARD_DESCRIPTION = """Write a checkpoint's weights anew: for another layout, or in files of another size or type.

A distributed checkpoint loads under any TP x PP x DP as it is, so nothing has to be resharded to change a layout. What
this makes is the folder that the ranks of --tensor-model-parallel-size x --pipeline-model-parallel-size would have
written: each of them then reads one file, and only what it keeps. The optimizer's state stays behind.

An HF folder is written with files of --shard-size and in --dtype.

reads   the checkpoint; of a distributed one also config.json of the HF folder it came from
writes  the folder --save

examples
  tspin checkpoint reshard runs/first/initial/checkpoint --save base_tp2 --tensor-model-parallel-size 2
  tspin checkpoint reshard models/base --save base_bf16 --dtype bfloat16 --shard-size 2GB"""

_AVERAGE_DESCRIPTION = """Write the mean of several checkpoints of one architecture, all of one kind.

Sums are in fp32, and each tensor keeps the type that it has in the first checkpoint, from which everything else is
taken too. Checkpoints of different architectures are refused, and what differs is named.

reads   the checkpoints
writes  the folder --save

example
  tspin checkpoint average runs/first/iteration_00{0,1}/checkpoint/step_* --save mean"""

_DIFF_DESCRIPTION = """Say which tensors of two checkpoints differ, and by how much.

max abs is the largest absolute difference of two values, relative the norm of the difference over the norm of the first
tensor. A distributed checkpoint and an HF folder are compared under the HF folder's names. Exit codes are those of
diff: 0 the same, 1 they differ (in shapes, types or values), 2 a checkpoint cannot be read.

reads   all weights of both
writes  nothing

example
  tspin checkpoint diff models/base runs/first/export/hf --json"""


def add_parser(subparsers: "Subparsers") -> None:
    """Adds the command."""
    parser = command_parser(subparsers, "checkpoint", "look at, reshard, average, compare checkpoints", _DESCRIPTION)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    info = command_parser(actions, "info", "what a checkpoint is", _INFO_DESCRIPTION)
    _add_folder(info)
    info.add_argument("--digests", action="store_true", help="read an HF folder's files for their SHA-256")
    _add_json(info)
    info.set_defaults(run=run_info)
    verify = command_parser(actions, "verify", "whether a checkpoint is whole", _VERIFY_DESCRIPTION)
    _add_folder(verify)
    _add_json(verify)
    verify.set_defaults(run=run_verify)
    _add_reshard(actions)
    average = command_parser(actions, "average", "the mean of several checkpoints", _AVERAGE_DESCRIPTION)
    average.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="at least two checkpoints")
    _add_save(average)
    add_files(average, dtype=False)
    average.set_defaults(run=run_average)
    diff = command_parser(actions, "diff", "which tensors of two checkpoints differ", _DIFF_DESCRIPTION)
    diff.add_argument("first", type=Path, metavar="FIRST", help="a checkpoint of either kind")
    diff.add_argument("second", type=Path, metavar="SECOND", help="another one")
    _add_json(diff)
    diff.set_defaults(run=run_diff)


def _add_reshard(actions: "Subparsers") -> None:
    reshard = command_parser(actions, "reshard", "for another layout, file size or type", _RESHARD_DESCRIPTION)
    _add_folder(reshard)
    _add_save(reshard)
    for name in ("tensor", "pipeline"):
        reshard.add_argument(
            f"--{name}-model-parallel-size",
            type=positive_number,
            metavar="N",
            help="of the layout that a distributed checkpoint is written for [1]",
        )
    reshard.add_argument(
        "--hf-checkpoint",
        type=Path,
        metavar="HF_DIR",
        help="HF folder that a distributed checkpoint came from [the one that it names]",
    )
    add_files(reshard)
    reshard.set_defaults(run=run_reshard)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="HF folder, or folder with a manifest.json")


def _add_save(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="folder to write")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run_info(args: argparse.Namespace) -> int:
    """Runs `tspin checkpoint info`."""
    from megatron_tspin.checkpoint.inspection import inspect
    from megatron_tspin.cli.checkpoint_text import facts_text

    facts = inspect(args.folder, args.digests)
    _print(dataclasses.asdict(facts) if args.json else facts_text(facts))
    return EXIT_OK


def run_verify(args: argparse.Namespace) -> int:
    """Runs `tspin checkpoint verify`."""
    try:
        files, size = _verified(args.folder)
    except InputError as error:
        if not args.json:
            raise
        _print({"folder": str(args.folder), "whole": False, "problems": str(error).splitlines()})
        return error.exit_code
    if args.json:
        _print({"folder": str(args.folder), "whole": True, "files": files, "bytes": size})
    else:
        _print(f"{args.folder}: whole, {files} files, {size} bytes\n")
    return EXIT_OK


def _verified(folder: Path) -> tuple[int, int]:
    """Number of files, and their bytes."""
    if not (folder / "config.json").is_file():  # what a distributed one lacks, its manifest says
        files = verify_checkpoint(folder)["files"]
        return len(files), sum(facts["size"] for facts in files.values())
    from megatron_tspin.checkpoint.hf_verification import verify_hf

    return verify_hf(folder)


def run_reshard(args: argparse.Namespace) -> int:
    """Runs `tspin checkpoint reshard`."""
    from megatron_tspin.checkpoint.any_folder import is_core
    from megatron_tspin.checkpoint.resharding import reshard_core, rewrite_hf
    from megatron_tspin.config import ParallelSection

    refuse_existing_folder(args.save)
    layout = {name: getattr(args, name) for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size")}
    if is_core(args.folder):
        _refuse(args, "only for HF folders", "shard_size", "dtype")
        given = {name: size for name, size in layout.items() if size is not None}
        reshard_core(args.folder, _source_of(args), ParallelSection(**given), args.save)
    else:
        _refuse(args, "only for distributed checkpoints; an HF folder has no layout", *layout, "hf_checkpoint")
        rewrite_hf(args.folder, args.save, args.shard_size, dtype_of(args))
    return EXIT_OK


def _source_of(args: argparse.Namespace) -> Path:
    """The HF folder of a distributed checkpoint."""
    from megatron_tspin.checkpoint.manifest import read_manifest

    named = args.hf_checkpoint or read_manifest(args.folder)["state"].get("hf_checkpoint")
    if named is None or not Path(named).is_dir():
        where = "names no HF folder" if named is None else f"came from {named}, which is not there"
        raise InputError(f"{args.folder}: {where}; give --hf-checkpoint")
    return Path(named)


def _refuse(args: argparse.Namespace, why: str, *names: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    if given:
        raise InputError(f"{', '.join(given)}: {why}")


def run_average(args: argparse.Namespace) -> int:
    """Runs `tspin checkpoint average`."""
    from megatron_tspin.checkpoint.averaging import average

    refuse_existing_folder(args.save)
    average(args.folders, args.save, args.shard_size)
    return EXIT_OK


def run_diff(args: argparse.Namespace) -> int:
    """Runs `tspin checkpoint diff`."""
    from megatron_tspin.checkpoint.any_folder import open_weights
    from megatron_tspin.checkpoint.comparison import comparable, compare
    from megatron_tspin.cli.checkpoint_text import differences_json, differences_text

    found = list(compare(*comparable(open_weights(args.first), open_weights(args.second))))
    _print(differences_json(found) if args.json else differences_text(found))
    return EXIT_FAILED if any(each.differs for each in found) else EXIT_OK


def _print(result: dict[str, Any] | str) -> None:
    sys.stdout.write(result if isinstance(result, str) else json.dumps(result, indent=2) + "\n")
