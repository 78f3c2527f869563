"""megatron-core's distributed checkpoints, whole or invisible, loadable under any TP x PP x DP.

A checkpoint is a folder with megatron-core's files (format torch_dist) and `manifest.json`: size and SHA-256 of each
file, facts about what was saved, and the caller's `state`. It is written under a temporary name and renamed when the
manifest is on the disk. Random state is not stored: training draws nothing (no dropout), and the order of the data and
every sampled response come from the seed of the run.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.fp8_utils import is_float8tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tspin.checkpoint.fp8_state import delayed_scaling_state, history_length, restore
from megatron_tspin.checkpoint.in_process_save import InProcessSave
from megatron_tspin.checkpoint.manifest import describe_files, write_manifest
from megatron_tspin.checkpoint.optimizer_state import (
    check_continues,
    describe_optimizer,
    has_masters,
    held,
    set_step,
    sharded_masters,
    sharded_state,
)
from megatron_tspin.checkpoint.safe_pickle import check_pickles, restricted_metadata
from megatron_tspin.checkpoint.shards import bare_policies, by_place, sharded_parameters, whole_shards
from megatron_tspin.checkpoint.verification import verify_together
from megatron_tspin.errors import ArtifactError, DiskFullError, InputError, StageError
from megatron_tspin.heartbeat import busy
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.fp8_linear import weights_changed
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.parallel import Topology
from megatron_tspin.storage import explain_full, fsync_path, is_full


@torch.no_grad()
@busy("writing a checkpoint")
def save_checkpoint(
    folder: Path,
    model: torch.nn.Module | Sequence[torch.nn.Module],
    topology: Topology,
    optimizer: Any = None,
    state: Mapping[str, Any] | None = None,
    masters: Any = None,
) -> None:
    """Saves the policy, all ranks together. The folder appears whole; one of that name is replaced.

    Args:
        folder: Where to.
        model: `PolicyModel`, bare or in megatron-core's DistributedDataParallel, or those of all virtual stages.
        topology: This rank's place.
        optimizer: megatron-core's optimizer of the model, to continue from; None leaves it out.
        state: Small and JSON-able; `load_checkpoint` gives it back.
        masters: An optimizer whose fp32 master weights, if it has some, are saved in place of the parameters.

    Raises:
        StageError: A rank could not write, e.g. to a full disk; what was there before is untouched.
    """
    policies = bare_policies(model)
    parameters = sharded_parameters(policies)
    facts = _facts(policies, topology)
    tensors = dict(parameters)
    if masters is not None and has_masters(masters):
        tensors = by_place(sharded_masters(masters, parameters))
        facts["dtype"] = "float32"
    if optimizer is not None:
        tensors |= by_place(sharded_state(optimizer, parameters))
        facts["optimizer"] = describe_optimizer(optimizer)
    tensors |= delayed_scaling_state(policies, topology)
    temporary = folder.with_name(folder.name + ".partial")
    if topology.rank == 0:
        _make_empty(temporary)
    dist.barrier()
    try:
        dist_checkpointing.save(tensors, str(temporary), sharded_strategy=InProcessSave())
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values() if is_full(cause)]
        if causes:
            raise DiskFullError(explain_full(folder, causes[0], _bytes_of(tensors))) from error
        raise StageError(f"{temporary}: cannot be written: {_reason(error)}") from error
    dist.barrier()
    files = _all_files(temporary, topology)
    if topology.rank == 0:
        write_manifest(temporary, files, facts, dict(state or {}))
        fsync_path(temporary)
        if folder.is_dir():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        fsync_path(folder.parent)
    dist.barrier()


def _bytes_of(tensors: Mapping[str, Any]) -> int:
    """Bytes of this rank's parts of the tensors."""
    parts = [part.data for part in tensors.values() if isinstance(getattr(part, "data", None), torch.Tensor)]
    return sum(part.numel() * part.element_size() for part in parts)


def _reason(error: BaseException) -> str:
    """What went wrong; of torch's collection of all ranks' failures the first."""
    if not isinstance(error, CheckpointException):
        return str(error).splitlines()[0]
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def _make_empty(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _all_files(folder: Path, topology: Topology) -> dict[str, Any]:
    """Flushes and describes all files, each rank a share of them."""
    names = sorted(path.name for path in folder.iterdir())
    shares: list[dict[str, Any]] = [{} for _ in range(topology.world_size)]
    dist.all_gather_object(shares, describe_files(folder, names[topology.rank :: topology.world_size]))
    described = {name: facts for share in shares for name, facts in share.items()}
    return {name: described[name] for name in names}


@torch.no_grad()
@busy("reading a checkpoint")
def load_checkpoint(
    folder: Path,
    model: torch.nn.Module | Sequence[torch.nn.Module],
    topology: Topology,
    optimizer: Any = None,
) -> dict[str, Any]:
    """Loads a checkpoint into the policy, whatever layout it was saved under. Values are cast to the parameters' dtype.

    Every file is checked against the manifest before any is opened, see `verification`.

    Args:
        folder: The checkpoint.
        model: As for `save_checkpoint`.
        topology: This rank's place.
        optimizer: Is loaded too, its step included; hyperparameters stay as they are.

    Returns:
        The `state` that was saved.

    Raises:
        ArtifactError: The checkpoint is not whole; names the file, the promised and the actual value.
        InputError: It is of another architecture, has no optimizer that this one could continue from, or comes from a
            newer megatron-core.
    """
    policies = bare_policies(model)
    manifest = _check(folder, policies[0], topology)
    parameters = sharded_parameters(policies)
    state = []
    if optimizer is not None:
        check_continues(folder, optimizer, manifest["facts"]["optimizer"])
        state = sharded_state(optimizer, parameters)
    targets = {name: leaf.data for name, leaf in parameters.items()}
    _load_weights(folder, manifest, policies, topology, parameters, targets, state)
    for policy in policies:
        weights_changed(policy)
    if optimizer is not None:
        set_step(optimizer, manifest["facts"]["optimizer"]["step"])
    return dict(manifest["state"])


@torch.no_grad()
@busy("reading a checkpoint")
def load_masters(
    folder: Path, model: torch.nn.Module | Sequence[torch.nn.Module], topology: Topology, optimizer: Any
) -> None:
    """Loads a checkpoint into a bf16 policy and, as exactly as it was saved, into its fresh optimizer's fp32 masters.

    It is read once, into the gradient buffers: these have fp32 room for every parameter and wait for the first step.
    Until that clears them, they hold the weights in fp32.

    Args:
        folder: The checkpoint.
        model: megatron-core's DistributedDataParallel, or those of all virtual stages.
        topology: This rank's place.
        optimizer: megatron-core's, with fp32 masters.

    Raises:
        ArtifactError: As `load_checkpoint`.
        InputError: As `load_checkpoint`.
    """
    policies = bare_policies(model)
    manifest = _check(folder, policies[0], topology)
    parameters = sharded_parameters(policies)
    exact = {name: leaf.data.main_grad for name, leaf in parameters.items()}
    _load_weights(folder, manifest, policies, topology, parameters, exact)
    for leaf in parameters.values():
        leaf.data.copy_(leaf.data.main_grad)
    for policy in policies:
        weights_changed(policy)
    for part in held(optimizer):
        part.updated.copy_(part.cut(part.parameter.main_grad))


def _check(folder: Path, policy: PolicyModel, topology: Topology) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole and of the policy's architecture."""
    manifest = verify_together(folder, topology)
    _check_architecture(folder, policy.architecture, manifest["facts"]["architecture"])
    _check_format(folder, manifest["facts"]["megatron_core"])
    return manifest


def _load_weights(
    folder: Path,
    manifest: dict[str, Any],
    policies: Sequence[PolicyModel],
    topology: Topology,
    parameters: dict[str, Any],
    targets: dict[str, torch.Tensor],
    state: Sequence[ShardedTensor] = (),
) -> None:
    """Reads the weights into `targets`, by name, the scales of FP8, and what there is of the optimizer's `state`."""
    places = {name: _place(target) for name, target in targets.items()}
    weights = [shard for name, leaf in parameters.items() for shard in whole_shards(leaf, places[name], name)]
    scaling = {}
    if history_length(policies) is not None and manifest["facts"].get("delayed_scaling") == history_length(policies):
        scaling = delayed_scaling_state(policies, topology)
    restore(scaling, _load(folder, by_place([*weights, *state]) | scaling))
    for name, target in targets.items():
        if is_float8tensor(target):
            target.copy_(places[name])


def _place(target: torch.Tensor) -> torch.Tensor:
    """Where to read to: the target, unless Transformer Engine holds it in FP8."""
    if is_float8tensor(target):
        return torch.empty(target.shape, dtype=target.dtype, device=target.device)
    return target.detach()


def _load(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    check_pickles(folder)
    try:
        with restricted_metadata():
            loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(folder))
    except (CheckpointException, CheckpointingException, UnpicklingError) as error:
        # torch's CheckpointException is no Exception: it would pass every other handler.
        raise ArtifactError(f"{folder}: cannot be loaded: {_reason(error)}") from error
    return loaded


def _facts(policies: Sequence[PolicyModel], topology: Topology) -> dict[str, Any]:
    policy = policies[0]
    return {
        "layout": {"tp": topology.tp_size, "pp": topology.pp_size, "dp": topology.dp_size, "cp": topology.cp_size},
        "megatron_core": version("megatron-core"),
        "torch": torch.__version__,
        "dtype": str(next(policy.parameters()).dtype).removeprefix("torch."),
        "architecture": _summary(policy.architecture),
        "optimizer": None,
        "delayed_scaling": history_length(policies),
    }


def _summary(architecture: Architecture) -> dict[str, Any]:
    """What decides about the tensors' shapes and names."""
    names = ("family", "vocab_size", "hidden_size", "ffn_hidden_size", "num_layers", "num_heads", "num_kv_heads",
             "head_dim", "tied_embeddings")  # fmt: skip
    return {name: getattr(architecture, name) for name in names}


def _check_architecture(folder: Path, architecture: Architecture, saved: dict[str, Any]) -> None:
    ours = _summary(architecture)
    different = [name for name in ours if ours[name] != saved.get(name)]
    if different:
        lines = [f"{name} is {saved.get(name)} there and {ours[name]} in the model" for name in different]
        raise InputError(
            f"{folder}: a checkpoint of another architecture than {architecture.folder}: {'; '.join(lines)}"
        )


def _check_format(folder: Path, saved_by: str) -> None:
    """megatron-core 0.16 loads nothing without `common.pt`, which 0.19 no longer writes but still reads."""
    needs_common_file = "common_strategy" in signature(dist_checkpointing.load).parameters
    if needs_common_file and not (folder / "common.pt").exists():
        raise InputError(
            f"{folder}: saved by megatron-core {saved_by}, which {version('megatron-core')} cannot read; install that "
            "version or a newer one"
        )
