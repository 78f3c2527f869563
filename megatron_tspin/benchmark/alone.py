"""A process that is a world of its own."""

import os
from contextlib import AbstractContextManager

from megatron_tspin.config import ParallelSection
from megatron_tspin.parallel import Topology, distributed

# The port is any free one, as nobody else has to find it.
_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def alone(layout: ParallelSection, tokens_multiple: int) -> AbstractContextManager[Topology]:
    """Joins megatron-core's groups as the only rank; see `parallel.distributed`."""
    os.environ |= _ALONE
    return distributed(layout, tokens_multiple=tokens_multiple)
