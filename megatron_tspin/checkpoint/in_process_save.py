"""megatron-core's torch_dist format, written by the rank itself.

megatron-core forks a writer process for each of a rank's files and starts a manager process for their results. A forked
writer that dies (out of memory, a missing package) leaves the rank waiting for ever, and forking a process that runs
communication threads is a risk of its own. torch's own writer does the same work in this process. The folder is the
same to whoever loads it.
"""

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict_saver import save


class _NamelessWriter(FileSystemWriter):
    """Leaves out of the metadata where it was written, and torch's random id of each save.

    So the same policy gives the same bytes, and a checkpoint made again has the digest that others were made from.
    """

    def storage_meta(self) -> StorageMeta:
        """Nothing."""
        return StorageMeta()


# megatron-core ships no types, so to mypy its classes are Any, and strict mypy refuses to subclass that.
class InProcessSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """The strategy to hand to `megatron.core.dist_checkpointing.save`."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Writes this rank's tensors and, on rank 0, the metadata of all."""
        force_all_tensors_to_non_fp8(sharded_state_dict)  # torch would pickle Transformer Engine's classes
        tensors, *_ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        save(
            mcore_to_pyt_state_dict(tensors, False),
            storage_writer=_NamelessWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
