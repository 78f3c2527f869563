"""`tspin`: picks the command, and turns errors into one clear line and an exit code."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron_tspin import __version__
from megatron_tspin.cli import (
    bench,
    checkpoint,
    convert,
    doctor,
    env,
    evaluate,
    export,
    generate,
    quickstart,
    report,
    rollout,
    run,
    score,
    status,
    submit,
    tokenize,
    train,
)
from megatron_tspin.cli.arguments import EXIT_CODES
from megatron_tspin.errors import EXIT_FAILED, DiskFullError, LostRankError, StoppedError, TspinError
from megatron_tspin.heartbeat import start_beating
from megatron_tspin.log import LOG_FILE_VARIABLE, get_logger, set_up_logging
from megatron_tspin.rank_variables import adopt_launcher
from megatron_tspin.run_folder import beats_folder
from megatron_tspin.selfplay.failure import Failure, record_failure
from megatron_tspin.selfplay.launch import forget_launchers, refuse_other_drivers
from megatron_tspin.storage import explain_full, is_full

EXIT_INTERRUPTED = 130

_COMMANDS = (
    run,
    submit,
    doctor,
    status,
    quickstart,
    tokenize,
    convert,
    rollout,
    train,
    generate,
    evaluate,
    score,
    export,
    report,
    checkpoint,
    bench,
    env,
)

_DESCRIPTION = """T-SPIN: triplet-based self-play fine-tuning of language models on megatron-core.

`tspin run` does everything from an HF checkpoint and annotated answers to a fine-tuned HF checkpoint and a report.
The other commands are its stages and their building blocks. Start with `tspin quickstart`."""

logger = get_logger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The command line without the program's name; None takes the process's.

    Returns:
        The exit code. A rank that failed among others does not return but ends the process.
    """
    args = build_parser().parse_args(argv)
    launched_as = 0
    if getattr(args, "drives", False):
        launched_as = forget_launchers()
    else:
        adopt_launcher(os.environ)
    rank = int(os.environ.get("RANK", "0"))
    _set_up_log(rank)
    try:
        refuse_other_drivers(launched_as)
        code: int = args.run(args)
    except TspinError as error:
        if _tell_driver(Failure(rank, error.exit_code, str(error), isinstance(error, LostRankError))):
            _say(error, rank)
        code = error.exit_code
    except OSError as error:
        code = _full_or_unexpected(error, rank)
    except KeyboardInterrupt:
        sys.stderr.write("tspin: interrupted; the same command continues\n")
        code = EXIT_INTERRUPTED
    except Exception as error:
        code = _unexpected(error, rank)
    if code:
        _end_if_among_ranks(code)
    return code


def _unexpected(error: Exception, rank: int) -> int:
    logger.exception("unexpected failure%s", f" of rank {rank}" if rank else "")
    _tell_driver(Failure(rank, EXIT_FAILED, f"{type(error).__name__}: {error}"))
    return EXIT_FAILED


def _full_or_unexpected(error: OSError, rank: int) -> int:
    """A full disk may meet any file: those that are written line by line say it here."""
    if not is_full(error):
        return _unexpected(error, rank)
    full = DiskFullError(explain_full(Path(error.filename or os.environ.get(LOG_FILE_VARIABLE, "a file")), error))
    _tell_driver(Failure(rank, full.exit_code, str(full)))
    _say(full, rank)
    return full.exit_code


def _end_if_among_ranks(code: int) -> None:
    """Ends the process where a failure left its groups up, now that the failure is recorded.

    The system then closes its connections, and peers that wait for it in a collective fail at once. An orderly end may
    itself wait: torch's exit for collectives that are under way, and they for the peers.
    """
    if "megatron_tspin.parallel" not in sys.modules:  # the driver has no torch, and needs none to see that
        return
    from megatron_tspin.parallel import groups_are_up

    if groups_are_up():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="tspin",
        description=_DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tspin {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subparsers)
    return parser


def _set_up_log(rank: int) -> None:
    """Log lines go to stderr and, in a stage of a run, to the stage's log file too, beside which the ranks beat."""
    set_up_logging(speak=rank == 0)
    log_file = os.environ.get(LOG_FILE_VARIABLE)
    if log_file is None:
        return
    handler = logging.FileHandler(log_file, encoding="utf-8")  # appends: an earlier attempt's lines stay
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)-7s %(message)s"))
    logging.getLogger("megatron_tspin").addHandler(handler)
    start_beating(beats_folder(Path(log_file)), rank)


def _tell_driver(failure: Failure) -> bool:
    """Leaves the failure for the driver, if there is one; False when another rank already said the same."""
    log_file = os.environ.get(LOG_FILE_VARIABLE)
    if log_file is None:
        return True
    return record_failure(Path(log_file), failure)


def _say(error: TspinError, rank: int) -> None:
    """One line for each line of the error."""
    who = f" (rank {rank})" if rank else ""
    kind = "stopped" if isinstance(error, StoppedError) else "error"
    lines = [f"tspin: {kind}{who}: {line}\n" for line in str(error).splitlines()]
    sys.stderr.writelines(lines)
    log_file = os.environ.get(LOG_FILE_VARIABLE)
    if log_file is not None:
        with suppress(OSError), open(log_file, "a", encoding="utf-8") as stream:  # stderr has it
            stream.writelines(lines)
