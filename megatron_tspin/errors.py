"""Errors that a person can act on, and the exit codes they lead to.

Every message names what is wrong and where (file and line, or setting and value) and what to do about it.
"""

EXIT_OK = 0
EXIT_FAILED = 1  # an unexpected failure; a traceback was printed
EXIT_INPUT = 2  # the input or the configuration is at fault; nothing was changed
EXIT_STAGE = 3  # a stage of a run failed; the same command continues the run
EXIT_PARITY = 4  # a parity or drift gate refused what it measured
EXIT_DIVERGED = 5  # the loss or a gradient was not finite; no update was made
EXIT_STOPPED = 75  # asked to stop, and stopped with everything saved; sysexits.h calls it EX_TEMPFAIL

EXIT_CODE_HELP = (
    f"Exit codes: {EXIT_OK} done; {EXIT_FAILED} unexpected failure; {EXIT_INPUT} bad input or configuration; "
    f"{EXIT_STAGE} a stage failed, run the same command again to continue; {EXIT_PARITY} a parity or drift gate "
    f"refused; "
    f"{EXIT_DIVERGED} loss or gradient not finite; {EXIT_STOPPED} stopped as SIGTERM or SIGUSR1 asked, "
    "run the same command again to continue."
)


class TspinError(Exception):
    """Base of all errors that the command line reports in one line, without a traceback."""

    exit_code = EXIT_FAILED


class InputError(TspinError):
    """A file, a setting or a combination of settings cannot be used."""

    exit_code = EXIT_INPUT


class ArtifactError(InputError):
    """A file that this project wrote is missing, torn, or not the one that was promised."""


class StageError(TspinError):
    """A stage of a run ended with a failure."""

    exit_code = EXIT_STAGE


class DiskFullError(StageError):
    """A file could not be written because the disk, a quota or a limit is used up."""


class HangError(StageError):
    """A rank stands still."""


class LostRankError(StageError):
    """Another rank hangs or is gone: the consequence of a failure, never its cause."""


class ParityError(TspinError):
    """Two computations that must agree do not."""

    exit_code = EXIT_PARITY


class DivergenceError(TspinError):
    """A loss or a gradient is not finite."""

    exit_code = EXIT_DIVERGED


class StoppedError(TspinError):
    """Somebody asked for a stop, and everything is saved: no failure."""

    exit_code = EXIT_STOPPED
