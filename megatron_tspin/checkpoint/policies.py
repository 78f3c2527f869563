"""Which checkpoint holds which policy of a run."""

from pathlib import Path

from megatron_tspin.checkpoint.store import latest_checkpoint
from megatron_tspin.errors import ArtifactError
from megatron_tspin.run_folder import RunFolder


def policy_checkpoint(folder: RunFolder, policy: int) -> Path:
    """The checkpoint of policy number `policy` (0 is the initial policy).

    Raises:
        ArtifactError: It is not there, or no longer whole.
    """
    if policy == 0:
        return folder.initial_checkpoint
    checkpoints = folder.checkpoints(policy - 1)
    found: Path | None = latest_checkpoint(checkpoints)
    if found is None:
        raise ArtifactError(
            f"{checkpoints}: no whole checkpoint; unless the run released it (--tspin-keep-policies), `tspin run` with "
            "the same config makes it again"
        )
    return found
