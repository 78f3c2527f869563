"""The optimizer's tensors under names that do not depend on the layout.

megatron-core's optimizers keep their state differently (fp32, bf16 with masters, sharded over DP). Each tensor is
stored as `optimizer.state.<what>.<parameter>`, in the parameter's shape, by the ranks that hold it. A checkpoint holds
these and the step; hyperparameters come from the config and the schedule. So what one kind of optimizer saved, another
one loads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_tspin.checkpoint.shards import range_shards, whole_shards
from megatron_tspin.errors import InputError

_STATE = "optimizer.state."
_MASTER = _STATE + "fp32_param."
_FIRST_MOMENT = "exp_avg"
_SECOND_MOMENT = "exp_avg_sq"


@dataclass(frozen=True)
class Held:
    """What a rank's optimizer updates of one parameter.

    Attributes:
        parameter: The model's parameter, with megatron-core's attributes.
        updated: The parameter itself, its fp32 master, or a flat range of one of them.
        moments: Of `updated`'s shape, by their names in torch; empty before the first step.
        start: Of the range; None for the whole parameter.
    """

    parameter: Any
    updated: torch.Tensor
    moments: dict[str, torch.Tensor]
    start: int | None

    def shards(self, sharded: Any, tensor: torch.Tensor, name: str) -> list[ShardedTensor]:
        """Describes a tensor of `updated`'s shape to the checkpoint; `sharded` is the parameter."""
        if self.start is None:
            return whole_shards(sharded, tensor, name)
        return range_shards(sharded, tensor, self.start, name)

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a tensor of the parameter's shape that belongs to `updated`, a view."""
        if self.start is None:
            return tensor
        return tensor.reshape(-1)[self.start : self.start + self.updated.numel()]


def held(optimizer: Any) -> Iterator[Held]:
    """All that megatron-core's (chained) optimizer updates on this rank."""
    for part in optimizer.chained_optimizers:
        for parameter, updated, start in _updated(part):
            state = part.optimizer.state.get(updated, {})
            moments = {name: state[name] for name in _moments(part.optimizer) if name in state}
            yield Held(parameter, updated, moments, start)


def _updated(part: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, int | None]]:
    """(parameter, what is updated of it, where that begins)."""
    if isinstance(part, DistributedOptimizer):
        for parameter, (group, place) in part.model_param_group_index_map.items():
            updated = part.optimizer.param_groups[group]["params"][place]
            yield parameter, updated, part._get_model_param_range_map(parameter)["param"].start
    elif part.config.bf16:
        for parameters, masters in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from ((parameter, master, None) for parameter, master in zip(parameters, masters, strict=True))
    else:
        for group in part.optimizer.param_groups:
            yield from ((parameter, parameter, None) for parameter in group["params"])


def _moments(inner: Any) -> list[str]:
    """What a step leaves for the next one. Without momentum the first moment is the last gradient: nobody needs it."""
    has_momentum = any(group["betas"][0] > 0 for group in inner.param_groups)
    return [_FIRST_MOMENT, _SECOND_MOMENT] if has_momentum else [_SECOND_MOMENT]


def describe_optimizer(optimizer: Any) -> dict[str, Any]:
    """Facts for the manifest: step, whether there are fp32 masters beside the parameters, and the moments' names."""
    return {"step": _step(optimizer), "master_weights": has_masters(optimizer), "moments": _all_moments(optimizer)}


def _all_moments(optimizer: Any) -> list[str]:
    return sorted({name for part in optimizer.chained_optimizers for name in _moments(part.optimizer)})


def sharded_state(optimizer: Any, parameters: dict[str, Any]) -> list[ShardedTensor]:
    """Describes the optimizer's tensors, to be saved or to be loaded into.

    Args:
        optimizer: megatron-core's.
        parameters: Those of its model, of `shards.sharded_parameters`.
    """
    _initialise(optimizer)
    names = {parameter.data: name for name, parameter in parameters.items()}
    found = []
    for part in held(optimizer):
        name = names[part.parameter]
        tensors = {_STATE + moment: tensor for moment, tensor in part.moments.items()}
        if has_masters(optimizer):
            tensors[_MASTER.removesuffix(".")] = part.updated
        for prefix, tensor in tensors.items():
            found += part.shards(parameters[name], tensor.detach(), f"{prefix}.{name}")
    return found


def sharded_masters(optimizer: Any, parameters: dict[str, Any]) -> list[ShardedTensor]:
    """Describes the fp32 masters under the names of their parameters; none where the parameters are fp32."""
    if not has_masters(optimizer):
        return []
    names = {parameter.data: name for name, parameter in parameters.items()}
    return [
        shard
        for part in held(optimizer)
        for name in [names[part.parameter]]
        for shard in part.shards(parameters[name], part.updated.detach(), name)
    ]


def check_continues(folder: Path, optimizer: Any, facts: dict[str, Any] | None) -> None:
    """Refuses to continue from what does not fit.

    Args:
        folder: The checkpoint.
        optimizer: megatron-core's.
        facts: What the manifest says of the saved optimizer.

    Raises:
        InputError: The checkpoint has no optimizer, or one of another precision or kind.
    """
    if facts is None:
        raise InputError(f"{folder}: holds no optimizer state; continue from one saved inside an iteration")
    if facts["master_weights"] != has_masters(optimizer):
        saved, ours = ("bf16" if flag else "fp32" for flag in (facts["master_weights"], has_masters(optimizer)))
        raise InputError(
            f"{folder}: the optimizer was saved in {saved} and cannot continue in {ours}; keep --bf16 as it was"
        )
    missing = set(_all_moments(optimizer)) - set(facts.get("moments", _all_moments(optimizer)))
    if missing:
        raise InputError(
            f"{folder}: the saved optimizer has no {', '.join(sorted(missing))}; keep --optimizer as it was"
        )


def has_masters(optimizer: Any) -> bool:
    """Whether the optimizer updates fp32 masters of bf16 parameters."""
    return bool(optimizer.config.bf16)


def _initialise(optimizer: Any) -> None:
    """Gives every parameter its state, as the first step would: only what is there can be described."""
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
        if _counts_by_parameter(part.optimizer):
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))


def _step(optimizer: Any) -> int:
    for part in optimizer.chained_optimizers:
        states = part.optimizer.state.values() if _counts_by_parameter(part.optimizer) else part.optimizer.param_groups
        for state in states:
            return int(state.get("step", 0))
    return 0


def set_step(optimizer: Any, step: int) -> None:
    """Sets the step of every parameter that has a state, each a tensor of its own: torch counts in place."""
    for part in optimizer.chained_optimizers:
        if _counts_by_parameter(part.optimizer):
            for state in part.optimizer.state.values():
                state["step"] = torch.tensor(float(step))
        else:
            for group in part.optimizer.param_groups:
                group["step"] = step


def _counts_by_parameter(inner: Any) -> bool:
    """Whether the step is kept with each parameter, as torch does; fused optimizers keep it in their groups."""
    return isinstance(inner, torch.optim.Adam)
