"""What several commands share: their parsers, and the config or layout that their flags describe."""

import argparse
import re
import textwrap
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megatron_tspin.config import Config, ParallelSection
from megatron_tspin.config_source import StoreOnce, add_assignments, add_flags, load_config, overrides, settings
from megatron_tspin.errors import EXIT_CODE_HELP, InputError

if TYPE_CHECKING:
    import torch

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_PARALLEL = "parallel."
_DTYPES = ("float32", "bfloat16", "float16")
EXIT_CODES = textwrap.fill(EXIT_CODE_HELP, width=100)


def command_parser(subparsers: "Subparsers", name: str, summary: str, description: str) -> argparse.ArgumentParser:
    """Adds a command.

    Args:
        subparsers: Where the command goes.
        name: Its name.
        summary: One line for the list of commands.
        description: What it does, reads and writes, and an example.
    """
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.register("action", None, StoreOnce)  # of options that name no action
    return parser


def add_config(parser: argparse.ArgumentParser, only: Iterable[str] | None = None, required: bool = True) -> None:
    """Adds `--config`, `--set` and the flags of the named sections, which override it.

    See `config_source.add_flags`.
    """
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        required=required,
        help="YAML file with the settings, e.g. the run.yaml of a run; --set and the flags below override it",
    )
    add_assignments(parser)
    add_flags(parser, only)


def config_of(args: argparse.Namespace, unread: Collection[str] = ()) -> Config:
    """The config that `--config` and the flags describe.

    Args:
        args: The command line.
        unread: What the command never reads, see `config_source.load_config`.

    Raises:
        InputError: It is refused, or the command line sets what the command never reads.
    """
    given = overrides(args)
    flags = {item.name: item.flag or f"--set {item.name}" for item in settings()}
    idle = [flags[name] for name in given if name in unread or name.partition(".")[0] in unread]
    if idle:
        raise InputError(f"{', '.join(idle)}: this command does not read that; leave it out")
    return load_config(args.config, given, unread)


def layout_of(args: argparse.Namespace) -> ParallelSection:
    """The layout that the flags alone describe, for commands that work without a run.

    Raises:
        InputError: It is refused, or a flag of another section was given.
    """
    given: dict[str, Any] = overrides(args)
    flags = {item.name: item.flag for item in settings()}
    foreign = [
        flags[name] or f"--set {name}" for name in given if not name.startswith((_PARALLEL, "model.hf_checkpoint"))
    ]
    if foreign:
        raise InputError(f"{', '.join(foreign)}: only used together with --config")
    try:
        given = {k.removeprefix(_PARALLEL): v for k, v in given.items() if k.startswith(_PARALLEL)}
        return ParallelSection(**given).whole_stages()
    except ValidationError as error:
        messages = (f"{flags.get(_PARALLEL + str(item['loc'][-1])) if item['loc'] else 'layout'}: {item['msg']}"
                    for item in error.errors())  # fmt: skip
        raise InputError("\n".join(messages)) from error


def require(args: argparse.Namespace, **flags: str) -> None:
    """Demands flags that a command needs in one of its modes.

    Args:
        args: The command line.
        flags: Attribute of `args` to the flag's name; an attribute may have dots written as `__`.

    Raises:
        InputError: Names every flag that is absent.
    """
    given = {**vars(args), **overrides(args)}
    absent = [flag for name, flag in flags.items() if given.get(name.replace("__", ".")) is None]
    if absent:
        raise InputError(f"without --config this command needs {' and '.join(absent)}")


def add_output(parser: argparse.ArgumentParser, purpose: str, metavar: str, required: bool = True) -> None:
    """Adds `--output`, and `--overwrite` for what is there already."""
    parser.add_argument("--output", type=Path, required=required, metavar=metavar, help=purpose)
    parser.add_argument("--overwrite", action="store_true", help="replace what is there under the name of --output")


def add_iteration(
    parser: argparse.ArgumentParser, default: int | None = None, purpose: str = "self-play iteration, from 0"
) -> None:
    """Adds `--iteration`, required unless it has a default."""
    parser.add_argument(
        "--iteration", type=_natural_number, required=default is None, default=default, metavar="N", help=purpose
    )


def positive_number(text: str) -> int:
    """Argparse's type for a count of at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def byte_count(text: str) -> int:
    """Argparse's type for a size: `5GB`, `512MiB`, `800000`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0 or (found[3] and not found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB, 512MiB or a number of bytes")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))


def add_files(parser: argparse.ArgumentParser, dtype: bool = True) -> None:
    """Adds how the weights of an HF folder are written; `dtype_of` reads the second."""
    parser.add_argument(
        "--shard-size", type=byte_count, metavar="SIZE", help="most bytes of a file, such as 5GB or 512MiB [4GiB]"
    )
    if dtype:
        parser.add_argument("--dtype", choices=_DTYPES, help="write all tensors in this type [each as it is]")


def dtype_of(args: argparse.Namespace) -> "torch.dtype | None":
    """What `--dtype` asks for."""
    import torch

    found: torch.dtype | None = None if args.dtype is None else getattr(torch, args.dtype)
    return found


def _natural_number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number
