"""The optimizer's tensors under names that do not depend on the layout.

megatron-core's optimizers nest their state differently (fp32, bf16 with masters, sharded over DP), and only for tensors
does the nesting not matter: each is stored as `optimizer.state.<what>.<parameter>`. A checkpoint holds these and the
step; hyperparameters come from the config and the schedule. So what one kind of optimizer saved, another one loads.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_tspin.errors import InputError

METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "non_homogeneous_layers": True,  # a name of its own for each layer, counted through the whole network
}
_STATE = "optimizer.state."
_SHARDED_MASTER = _STATE + "param."  # the distributed optimizer's name for it
_MASTER = _STATE + "fp32_param."


def describe_optimizer(optimizer: Any) -> dict[str, Any]:
    """Facts for the manifest: step, and whether there are fp32 masters beside the parameters."""
    _initialise(optimizer)
    return {"step": _step(optimizer), "master_weights": _has_masters(optimizer)}


def sharded_state(optimizer: Any, model_state: dict[str, Any]) -> dict[str, Any]:
    """megatron-core's sharded tensors of the optimizer, by name, to be saved.

    Args:
        optimizer: megatron-core's, for one model.
        model_state: The model's own sharded tensors, with the parameters themselves as data.
    """
    _initialise(optimizer)
    tree = optimizer.sharded_state_dict(model_state, metadata=dict(METADATA))
    return _named(tree, _has_masters(optimizer))


def master_weights(optimizer: Any, model_state: dict[str, Any]) -> dict[str, Any]:
    """megatron-core's sharded fp32 masters under the names of their parameters; none where parameters are fp32."""
    return _as_weights(sharded_state(optimizer, model_state))


class LoadingPlan:
    """Loads an optimizer in three steps: name what is wanted, let megatron-core read it, put it in place."""

    def __init__(self, optimizer: Any, model_state: dict[str, Any], step: int, from_weights: bool) -> None:
        """Says what is wanted.

        Args:
            optimizer: megatron-core's.
            model_state: The model's own sharded tensors.
            step: Steps that the optimizer has made.
            from_weights: Only the masters, from the weights of a checkpoint; the rest of the state becomes zero.
        """
        _initialise(optimizer)
        self._optimizer = optimizer
        self._step = step
        self._tree = optimizer.sharded_state_dict(model_state, is_loading=True, metadata=dict(METADATA))
        self._from_weights = from_weights
        named = _named(self._tree, _has_masters(optimizer))
        self.wanted = _as_weights(named) if from_weights else named

    @classmethod
    def to_continue(
        cls, folder: Path, optimizer: Any, model_state: dict[str, Any], facts: dict[str, Any] | None
    ) -> "LoadingPlan":
        """To go on where the saved optimizer stopped, of which the manifest has `facts`.

        Raises:
            InputError: The checkpoint has no optimizer, or one of another precision.
        """
        if facts is None:
            raise InputError(f"{folder}: holds no optimizer state; continue from one saved inside an iteration")
        if facts["master_weights"] != _has_masters(optimizer):
            saved, ours = ("bf16" if flag else "fp32" for flag in (facts["master_weights"], _has_masters(optimizer)))
            raise InputError(
                f"{folder}: the optimizer was saved in {saved} and cannot continue in {ours}; keep --bf16 as it was"
            )
        return cls(optimizer, model_state, facts["step"], from_weights=False)

    def finish(self, loaded: dict[str, Any], parameters: dict[str, torch.Tensor]) -> None:
        """Puts the loaded tensors into the optimizer.

        Args:
            loaded: What `wanted` was replaced by.
            parameters: The model's loaded parameters by their sharded name; masters of an fp32 optimizer are these.
        """

        def value(leaf: Any) -> Any:
            if not _is_sharded(leaf):
                return getattr(leaf, "unwrap", lambda: leaf)()
            name = _name(leaf.key)
            if name in loaded:
                return loaded[name]
            if self._from_weights:
                return torch.zeros_like(leaf.data)
            return parameters[name.removeprefix(_MASTER)]

        tree = _map(self._tree, value)
        of_shards = tree.pop("param_state", None)
        inner = tree.get("optimizer", tree)
        counts = all(_counts_by_parameter(part.optimizer) for part in self._optimizer.chained_optimizers)
        if "state" in inner and counts:  # torch refuses states without a step, fused optimizers those with one
            inner["state"]["common_step"] = torch.tensor(float(self._step))
        self._optimizer.load_state_dict(tree)
        if of_shards is not None:
            _load_shards(self._optimizer, of_shards)
        _set_step(self._optimizer, self._step)


def _initialise(optimizer: Any) -> None:
    """Gives every parameter its state, as the first step would: megatron-core can only describe what is there."""
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


def _has_masters(optimizer: Any) -> bool:
    return bool(optimizer.config.bf16)


def _load_shards(optimizer: Any, values: dict[int, Any]) -> None:
    """Cuts this rank's shards out of whole tensors, for the distributed optimizer."""
    (part,) = optimizer.chained_optimizers
    # megatron-core would look for torch's `step` among the tensors, where it is not.
    for state in part.optimizer.state.values():
        state.pop("step", None)
    part.load_parameter_state_from_fully_reshardable(values)


def _set_step(optimizer: Any, step: int) -> None:
    """Sets the step of every parameter, each a tensor of its own: torch counts in place."""
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


def _is_sharded(leaf: Any) -> bool:
    return hasattr(leaf, "key") and hasattr(leaf, "replica_id")


def _name(key: str) -> str:
    return _MASTER + key.removeprefix(_SHARDED_MASTER) if key.startswith(_SHARDED_MASTER) else key


def _named(tree: Any, with_masters: bool) -> dict[str, Any]:
    """The sharded leaves of a tree by name; without masters where the parameters are their own."""
    found: dict[str, Any] = {}

    def take(leaf: Any) -> Any:
        if _is_sharded(leaf):
            name = _name(leaf.key)
            if with_masters or not name.startswith(_MASTER):
                leaf.key = name
                found[name] = leaf
        return leaf

    _map(tree, take)
    return found


def _as_weights(named: dict[str, Any]) -> dict[str, Any]:
    """The masters among an optimizer's tensors, renamed to the parameters that they are."""
    found = {}
    for name, leaf in named.items():
        if name.startswith(_MASTER):
            leaf.key = name.removeprefix(_MASTER)
            found[leaf.key] = leaf
    return found


def _map(tree: Any, function: Callable[[Any], Any]) -> Any:
    """A copy of nested dicts and lists with every leaf replaced."""
    if isinstance(tree, dict):
        return {key: _map(value, function) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_map(value, function) for value in tree]
    return function(tree)
