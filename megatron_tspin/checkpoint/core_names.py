"""Names of megatron-core's parameters: as the table has them, as Transformer Engine does, and as checkpoints do."""

import re
from collections.abc import Container

from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families import table

LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
EMBEDDING, OUTPUT_LAYER = f"{table.EMBEDDING}.weight", f"{table.OUTPUT_LAYER}.weight"
# Transformer Engine's linears have the norm before them inside.
TABLE_NAMES = {
    f"{linear}.layer_norm_{kind}": f"{norm}.{kind}"
    for linear, norm in (("self_attention.linear_qkv", "input_layernorm"), ("mlp.linear_fc1", "pre_mlp_layernorm"))
    for kind in ("weight", "bias")
}
"""Transformer Engine's name within a layer to the table's."""
_SAVED_NAMES = {ours: theirs for theirs, ours in TABLE_NAMES.items()}


def saved_name(core: str, names: Container[str]) -> str:
    """The name in a checkpoint of a weight of the table: megatron-core saves norms under Transformer Engine's names.

    Args:
        core: As the table has it.
        names: Those of the checkpoint.
    """
    found = LAYER.match(core)
    if found is None or core in names:
        return core
    part = core[found.end() :]
    return found[0] + _SAVED_NAMES.get(part, part)


def stage_of(core: str, architecture: Architecture, pp_size: int) -> int:
    """The pipeline stage that holds a weight of the table."""
    found = LAYER.match(core)
    if found:
        return int(found[1]) // (architecture.num_layers // pp_size)
    return 0 if core == EMBEDDING else pp_size - 1
