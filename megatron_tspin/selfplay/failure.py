"""How a rank tells the driver why it failed: torchrun's own exit code is 1 whatever happened.

The first rank to fail leaves a small file beside the stage's log. Ranks that only lost another one leave one of another
name, which counts where no rank had a reason of its own: they may be quicker than the one whose failure it was.
"""

import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_tspin.errors import EXIT_DIVERGED, EXIT_INPUT, EXIT_PARITY, EXIT_STOPPED

_HANDED_ON = (EXIT_INPUT, EXIT_PARITY, EXIT_DIVERGED, EXIT_STOPPED)


@dataclass(frozen=True)
class Failure:
    """The end of one rank."""

    rank: int
    exit_code: int
    message: str
    consequence: bool = False
    """The rank only lost another one."""


def failure_file(log_file: Path, consequence: bool = False) -> Path:
    """Where the failure of the stage with this log is kept."""
    return log_file.with_suffix(".lost.json" if consequence else ".failure.json")


def record_failure(log_file: Path, failure: Failure) -> bool:
    """Leaves the failure for the driver, if the disk takes it; where it does not, it is told on stderr alone.

    Returns:
        False when another rank was first and said the same, so that there is nothing new to tell a person.
    """
    path = failure_file(log_file, failure.consequence)
    temporary = path.with_name(f"{path.name}.{failure.rank}.partial")
    try:
        temporary.write_text(json.dumps(asdict(failure)), encoding="utf-8")
        os.link(temporary, path)  # atomic, and refuses to replace the first rank's
    except FileExistsError:
        first = _read(path)
        return first is None or first.message != failure.message
    except OSError as error:
        sys.stderr.write(
            f"tspin: {path} cannot be written ({error.strerror}), so the driver will not know the reason\n"
        )
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return True


def read_failure(log_file: Path) -> Failure | None:
    """What the first rank that failed by itself left; if none did, the first that lost another one."""
    return _read(failure_file(log_file)) or _read(failure_file(log_file, consequence=True))


def _read(path: Path) -> Failure | None:
    try:
        return Failure(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # there is none, or it was torn by a full disk
        return None


def clear_failure(log_file: Path) -> None:
    """Forgets an earlier attempt's failure."""
    for consequence in (False, True):
        failure_file(log_file, consequence).unlink(missing_ok=True)


def handed_on(exit_code: int) -> bool:
    """Whether the driver ends with this exit code of a stage instead of its own."""
    return exit_code in _HANDED_ON
