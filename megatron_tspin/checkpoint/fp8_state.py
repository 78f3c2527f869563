"""What delayed scaling remembers, in checkpoints: the scales and largest values that the next FP8 step goes by.

Transformer Engine would pickle them; here they are plain tensors, named by layer. They are the same on every TP, CP and
DP rank, as the largest values are reduced over those before each update (`reduce_amax`, Transformer Engine's default).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.parallel import Topology

_PREFIX = "fp8_state."
_STATES = ("scaling_fwd", "scaling_bwd")
_TENSORS = ("scale", "amax_history")
_GEMMS = 1  # of a linear layer


def history_length(policies: Sequence[PolicyModel]) -> int | None:
    """Steps that delayed scaling remembers; None where it is not used."""
    config = policies[0].config
    return int(config.fp8_amax_history_len) if config.fp8 and config.fp8_recipe == "delayed" else None


def delayed_scaling_state(policies: Sequence[PolicyModel], topology: Topology) -> dict[str, ShardedTensor]:
    """Scales and histories of all FP8 layers of this rank by name, to be saved or loaded into; empty without any.

    Args:
        policies: The virtual stages of this rank.
        topology: This rank's place.
    """
    if history_length(policies) is None:
        return {}
    found = {}
    for name, module in _fp8_modules(policies):
        _initialise(module, policies[0].config)
        for state in _STATES:
            for tensor in _TENSORS:
                key = f"{_PREFIX}{name}.{state}.{tensor}"
                found[key] = ShardedTensor.from_rank_offsets(
                    key,
                    getattr(module.fp8_meta[state], tensor),
                    replica_id=(0, topology.tp_rank, topology.cp_rank + topology.cp_size * topology.dp_rank),
                )
    return found


@torch.no_grad()
def restore(wanted: dict[str, ShardedTensor], loaded: dict[str, Any]) -> None:
    """Copies loaded scales and histories to where the layers read them."""
    for name, leaf in wanted.items():
        leaf.data.copy_(loaded[name])


def _fp8_modules(policies: Sequence[PolicyModel]) -> Iterator[tuple[str, Any]]:
    """Transformer Engine's linears with their layer counted through the whole network."""
    for policy in policies:
        for layer in policy.decoder.layers:
            for name, module in layer.named_modules():
                if hasattr(module, "init_fp8_meta_tensors") and "fp8_meta" in vars(module):
                    yield f"layers.{layer.layer_number - 1}.{name}", module


def _initialise(module: Any, config: Any) -> None:
    """Makes the tensors, as the first FP8 forward pass would."""
    if all(state in module.fp8_meta for state in _STATES):
        return
    from megatron.core.fp8_utils import get_fp8_recipe

    recipe = get_fp8_recipe(config)
    module.fp8_meta["recipe"] = recipe
    module.fp8_meta["num_gemms"] = _GEMMS
    module.init_fp8_meta_tensors(recipe)
