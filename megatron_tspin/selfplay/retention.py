"""Which policies of a run stay on the disk, and the removal of the others."""

import shutil
from pathlib import Path

from pydantic import ValidationError

from megatron_tspin.config import Config
from megatron_tspin.errors import ArtifactError
from megatron_tspin.log import get_logger
from megatron_tspin.records import Evaluation
from megatron_tspin.run_folder import RunFolder
from megatron_tspin.selfplay import markers
from megatron_tspin.selfplay.plan import plan, policy_folder
from megatron_tspin.storage import read_json

logger = get_logger(__name__)


def release_policies(config: Config, latest: int) -> None:
    """Removes the checkpoints of policies that `self_play.keep_policies` no longer keeps.

    The marker of the stage that wrote a policy says so before its first file goes: an interruption in between leaves
    nothing unexplained, and the next call removes the rest.

    Args:
        config: The run.
        latest: Number of the policy whose rollout was the last one to be done.

    Raises:
        ArtifactError: A held-out result cannot be read, so that the best policy is unknown.
    """
    folder, run_dir = RunFolder(Path(config.run_dir)), Path(config.run_dir)
    stages = {stage.name: stage for stage in plan(config)}
    for policy in superfluous_policies(config, latest):
        checkpoints = folder.checkpoints(policy - 1)
        if not checkpoints.is_dir() or checkpoints in _still_needed(config):
            continue
        markers.record_release(run_dir, stages[f"train_{policy - 1:03d}"], checkpoints)
        shutil.rmtree(checkpoints)
        logger.info("policy %d released: %s", policy, checkpoints)


def superfluous_policies(config: Config, latest: int) -> list[int]:
    """Trained policies up to `latest` that are neither among the last ones nor the best one."""
    keep = config.self_play.keep_policies
    older = range(1, latest - keep + 1) if keep else range(0)
    if not older or not config.data.has_held_out:
        return list(older)
    folder = RunFolder(Path(config.run_dir))
    qualities = {policy: _quality(folder.evaluation(policy)) for policy in range(1, latest + 1)}
    best = max(qualities, key=qualities.__getitem__)  # the first one of equals, which stays it whatever follows
    return [policy for policy in older if policy != best]


def _quality(path: Path) -> float:
    """What makes one policy better than another: held-out accuracy where there is a scorer, else likelihood."""
    try:
        evaluation = Evaluation.model_validate(read_json(path))
    except ValidationError as error:
        raise ArtifactError(f"{path}: not the held-out results of a policy, so the best one is unknown") from error
    for result in (evaluation.sampled, evaluation.greedy):
        if result is not None and result.accuracy is not None:
            return result.accuracy
    return -evaluation.nll_per_token


def _still_needed(config: Config) -> set[Path]:
    """Policies that a stage without a marker reads."""
    run_dir = Path(config.run_dir)
    every = {policy_folder(RunFolder(run_dir), policy) for policy in range(config.self_play.iterations + 1)}
    open_stages = [stage for stage in plan(config) if not markers.is_done(stage, run_dir)]
    return every & {path for stage in open_stages for path in stage.inputs}
