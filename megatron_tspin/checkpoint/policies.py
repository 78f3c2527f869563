"""Which checkpoint holds which policy of a run, and policies with the weights of a checkpoint."""

from pathlib import Path

from megatron_tspin.checkpoint.manifest import warn_of_broken
from megatron_tspin.checkpoint.store import load_checkpoint
from megatron_tspin.checkpoint.verification import verify_together
from megatron_tspin.config import ParallelSection, TrainingSection
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.errors import ArtifactError
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.build import build_chunks
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.parallel import Topology, on_first_rank
from megatron_tspin.run_folder import RunFolder, step_folders


def newest_whole(checkpoints: Path, topology: Topology) -> Path | None:
    """The newest checkpoint of an iteration that is whole to the last bit; None if there is none. All ranks call it.

    Broken ones are passed over with a warning that says what is wrong.
    """
    for candidate in reversed(on_first_rank(lambda: step_folders(checkpoints), topology)):
        try:
            verify_together(candidate, topology)
        except ArtifactError as error:
            if topology.speaks:
                warn_of_broken(candidate, error)
        else:
            return candidate
    return None


def policy_checkpoint(folder: RunFolder, policy: int, topology: Topology) -> Path:
    """The checkpoint of policy number `policy` (0 is the initial policy). All ranks call it.

    Raises:
        ArtifactError: It is not there, or no longer whole; the initial policy's is only checked when it is loaded.
    """
    if policy == 0:
        return folder.initial_checkpoint
    checkpoints = folder.checkpoints(policy - 1)
    found = newest_whole(checkpoints, topology)
    if found is None:
        raise ArtifactError(
            f"{checkpoints}: no whole checkpoint; unless the run released it (--tspin-keep-policies), "
            "`tspin run --repair` with the same config makes it again"
        )
    return found


def load_policy(
    architecture: Architecture,
    parallel: ParallelSection,
    training: TrainingSection,
    precision: PrecisionSection,
    topology: Topology,
    folder: Path,
) -> PolicyModel:
    """Builds this rank's part of the policy and loads its weights; see `build_policy` and `load_checkpoint`."""
    (model,) = load_chunks(architecture, parallel, training, precision, topology, folder)
    return model


def load_chunks(
    architecture: Architecture,
    parallel: ParallelSection,
    training: TrainingSection,
    precision: PrecisionSection,
    topology: Topology,
    folder: Path,
) -> list[PolicyModel]:
    """As `load_policy`, a model for each virtual stage of this rank."""
    chunks = build_chunks(architecture, parallel, training, precision, topology)
    load_checkpoint(folder, chunks, topology)
    return chunks
