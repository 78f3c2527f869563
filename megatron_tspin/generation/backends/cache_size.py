"""How many answers a replica writes at once, and the memory that their keys and values may take."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger
from megatron_tspin.models.block_cache import BLOCK, blocks_for
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.parallel import Topology
from megatron_tspin.platform import device, free_bytes

_SHARE = 0.5
"""Of the free memory, where no budget is set; the rest is for activations and logits."""
_MIB, _GIB = 2**20, 2**30

_log = get_logger(__name__)


@dataclass(frozen=True)
class CacheSize:
    """Slots of a replica, and the blocks of `models.block_cache` that each rank has room for.

    Attributes:
        slots: Answers at once.
        blocks: In the memory of every rank of the replica.
        block_bytes: Of a block in all layers of this rank.
        speaks: Whether this rank says what it chose.
    """

    slots: int
    blocks: int
    block_bytes: int = 0
    speaks: bool = False

    def divided(self, lengths: Sequence[int], groups: int) -> list[tuple[int, int]]:
        """Slots and blocks of each group of slots, for answers that are together with their prompts at most so long.

        Args:
            lengths: Tokens of each, one or more answers.
            groups: Wanted; there are fewer where slots or blocks do not suffice for all.

        Raises:
            InputError: One of the answers does not fit; names the settings.
        """
        wanted = sorted(map(blocks_for, lengths), reverse=True)
        if wanted[0] > self.blocks:
            raise InputError(
                f"a prompt with its answer may take {max(lengths)} tokens, and the key-value cache has room for "
                f"{self.blocks * BLOCK}: raise --tspin-generation-cache-gib, lower --tspin-max-new-tokens, or generate "
                "with more TP or PP"
            )
        slots = min(self.slots, len(wanted))
        blocks = min(self.blocks, max(sum(wanted[:slots]), groups * wanted[0]))
        if self.speaks:
            _log.info(
                "%d answers at once; key-value cache of %d blocks of %d tokens, at most %.0f MiB on this rank",
                slots, blocks, BLOCK, blocks * self.block_bytes / _MIB,
            )  # fmt: skip
        count = min(groups, slots, blocks // wanted[0])
        return [((slots + number) // count, blocks // count) for number in range(count)]


def cache_size(model: PolicyModel, topology: Topology, slots: int, gib: float | None) -> CacheSize:
    """How much of it this replica can have.

    Args:
        model: This rank's part of the policy, in memory.
        topology: The layout.
        slots: Answers wanted at once.
        gib: Memory for keys and values on each rank; None: half of what is free.
    """
    config = model.config
    groups = max(1, (config.num_query_groups or config.num_attention_heads) // topology.tp_size)
    width = config.kv_channels or config.hidden_size // config.num_attention_heads
    layers = len(model.decoder.layers)
    block_bytes = max(1, layers) * 2 * groups * width * BLOCK * torch.finfo(config.params_dtype).bits // 8
    blocks = torch.tensor(int((free_bytes() * _SHARE if gib is None else gib * _GIB) // block_bytes), device=device())
    if topology.model_parallel_group.size() > 1:
        dist.all_reduce(blocks, dist.ReduceOp.MIN, group=topology.model_parallel_group)
    return CacheSize(slots, int(blocks), block_bytes, topology.speaks)
