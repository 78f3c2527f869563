"""Whether a run fits on the disk, estimated before it starts."""

import shutil
from pathlib import Path

from megatron_tspin.config import Config
from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger
from megatron_tspin.selfplay.weights import count_parameters

_BYTES_PER_PARAMETER = 4  # checkpoints hold fp32 master weights
_MOMENTS = 2  # of the optimizer, as large as the weights each; RMSProp checkpoints carry the unused one too
_FIXED_POLICIES = 2  # initial and exported

logger = get_logger(__name__)


def least_bytes(parameters: int, iterations: int) -> int:
    """What the weights alone need: the initial policy, one policy an iteration, the exported one."""
    return (_FIXED_POLICIES + iterations) * parameters * _BYTES_PER_PARAMETER


def likely_bytes(parameters: int, iterations: int) -> int:
    """The same with the optimizer's moments in each iteration's checkpoint."""
    return (_FIXED_POLICIES + (1 + _MOMENTS) * iterations) * parameters * _BYTES_PER_PARAMETER


def check_disk_space(config: Config) -> None:
    """Refuses a run whose weights alone do not fit, warns when its optimizer states might not.

    What an interrupted run has written already counts as available.

    Raises:
        InputError: Names the bytes needed and available.
    """
    run_dir = Path(config.run_dir)
    try:
        parameters = count_parameters(Path(config.model.hf_checkpoint))
    except InputError:
        return  # reported with the model
    iterations = config.self_play.iterations
    existing = next(folder for folder in (run_dir, *run_dir.parents) if folder.is_dir())
    available = shutil.disk_usage(existing).free + _written_bytes(run_dir)
    least, likely = least_bytes(parameters, iterations), likely_bytes(parameters, iterations)
    numbers = f"{run_dir}: the checkpoints of {iterations} iterations need"
    if least > available:
        raise InputError(f"{numbers} at least {least} bytes, available are {available}; free some or move --run-dir")
    if likely > available:
        logger.warning("%s about %d bytes with optimizer states, available are %d", numbers, likely, available)


def _written_bytes(run_dir: Path) -> int:
    return sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file())
