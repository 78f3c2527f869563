"""Whether a run fits on the disk, estimated before it starts."""

import shutil
from pathlib import Path

from megatron_tspin.config import Config
from megatron_tspin.data.sources import count_rows
from megatron_tspin.data.steps import steps_per_iteration
from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger
from megatron_tspin.selfplay.weights import count_parameters

_BYTES_PER_PARAMETER = 4  # checkpoints hold fp32 master weights
_BF16_BYTES = 2  # beside the masters, in checkpoints inside an iteration
_FIXED_POLICIES = 2  # initial and exported
_MOMENTS = {"rmsprop": 1, "adam": 2}  # in fp32, as large as the weights each

logger = get_logger(__name__)


def least_bytes(config: Config, parameters: int) -> int:
    """What the weights alone need in the end: the initial policy, those that are kept, the exported one."""
    return (_FIXED_POLICIES + _kept(config, config.self_play.iterations)) * parameters * _BYTES_PER_PARAMETER


def likely_bytes(config: Config, parameters: int, num_examples: int) -> int:
    """The most that a run needs at any time: in the end, or while its last iteration is trained.

    Then there are the initial policy, those kept so far, the checkpoints inside the iteration with their optimizer
    states, and the new policy.

    Args:
        config: The run.
        parameters: Of the policy.
        num_examples: Triplets of an iteration.
    """
    moments = _MOMENTS[config.optimizer.optimizer]
    inner = (1 + moments) * _BYTES_PER_PARAMETER + (_BF16_BYTES if config.precision.bf16 else 0)
    policies = 1 + _kept(config, config.self_play.iterations - 1) + 1
    training = policies * _BYTES_PER_PARAMETER + _inner_checkpoints(config, num_examples) * inner
    return max(training * parameters, least_bytes(config, parameters))


def _kept(config: Config, trained: int) -> int:
    """Trained policies that are on the disk when there have been `trained` of them."""
    keep = config.self_play.keep_policies
    best = 1 if config.data.has_held_out else 0
    return min(trained, keep + best) if keep else trained


def _inner_checkpoints(config: Config, num_examples: int) -> int:
    """The most checkpoints inside an iteration at a time; a new one is whole before the oldest goes."""
    training = config.training
    if training.save_interval is None:
        return 0
    steps = steps_per_iteration(num_examples, training.global_batch_size, training.epochs, training.train_iters)
    made = (steps - 1) // training.save_interval
    return min(made, training.keep_checkpoints + 1) if training.keep_checkpoints else made


def check_disk_space(config: Config) -> None:
    """Refuses a run whose weights alone do not fit, warns when its optimizer states might not.

    What an interrupted run has written already counts as available.

    Raises:
        InputError: Names the bytes needed and available.
    """
    run_dir = Path(config.run_dir)
    try:
        parameters = count_parameters(Path(config.model.hf_checkpoint))
        num_examples = count_rows(Path(config.data.annotated))
    except InputError:
        return  # reported with the model and the examples
    existing = next(folder for folder in (run_dir, *run_dir.parents) if folder.is_dir())
    available = shutil.disk_usage(existing).free + _written_bytes(run_dir)
    least, likely = least_bytes(config, parameters), likely_bytes(config, parameters, num_examples)
    numbers = f"{run_dir}: the checkpoints of {config.self_play.iterations} iterations need"
    if least > available:
        raise InputError(
            f"{numbers} at least {least} bytes, available are {available}; free some, move --run-dir, or "
            "keep fewer with --tspin-keep-policies"
        )
    if likely > available:
        logger.warning("%s about %d bytes with optimizer states, available are %d", numbers, likely, available)


def _written_bytes(run_dir: Path) -> int:
    return sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file())
