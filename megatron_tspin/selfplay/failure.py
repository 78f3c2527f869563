"""How a rank tells the driver why it failed: torchrun's own exit code is 1 whatever happened.

The first rank to fail leaves a small file beside the stage's log.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_tspin.errors import EXIT_DIVERGED, EXIT_INPUT, EXIT_PARITY

_HANDED_ON = (EXIT_INPUT, EXIT_PARITY, EXIT_DIVERGED)


@dataclass(frozen=True)
class Failure:
    """The end of one rank."""

    rank: int
    exit_code: int
    message: str


def failure_file(log_file: Path) -> Path:
    """Where the failure of the stage with this log is kept."""
    return log_file.with_suffix(".failure.json")


def record_failure(log_file: Path, failure: Failure) -> bool:
    """Leaves the failure for the driver.

    Returns:
        False when another rank was first and said the same, so that there is nothing new to tell a person.
    """
    path = failure_file(log_file)
    temporary = path.with_name(f"{path.name}.{failure.rank}.partial")
    temporary.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    try:
        os.link(temporary, path)  # atomic, and refuses to replace the first rank's
    except FileExistsError:
        first = read_failure(log_file)
        return first is None or first.message != failure.message
    finally:
        temporary.unlink()
    return True


def read_failure(log_file: Path) -> Failure | None:
    """What the first rank that failed left, if one did."""
    path = failure_file(log_file)
    return Failure(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def clear_failure(log_file: Path) -> None:
    """Forgets an earlier attempt's failure."""
    failure_file(log_file).unlink(missing_ok=True)


def handed_on(exit_code: int) -> bool:
    """Whether the driver ends with this exit code of a stage instead of its own."""
    return exit_code in _HANDED_ON
