"""From the triplets of a global batch to the micro-batches of one replica."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tspin.objective.rows import Pair, Rows, pad_rows, row_length


@dataclass(frozen=True)
class Triplet:
    """One example with the responses that the method computes.

    Attributes:
        id: Id of the prompt.
        prompt: Prompt ids.
        responses: Response ids by role, in the order of `roles.ROLES`.
        reference: log pi_t by role, for the methods that have a reference.
    """

    id: str
    prompt: Sequence[int]
    responses: Mapping[str, Sequence[int]]
    reference: Mapping[str, float] | None = None

    def pairs(self) -> list[Pair]:
        """The prompt with each response."""
        return [(self.prompt, response) for response in self.responses.values()]


@dataclass(frozen=True)
class MicroBatch:
    """Rows and what the loss needs to know of them. Response i of triplet t is number t * len(roles) + i.

    Attributes:
        rows: Tokens and targets.
        roles: Roles computed, in order.
        num_triplets: May be 0 in the last, incomplete global batch of an epoch.
        lengths: Response tokens, fp32 [num_triplets, len(roles)].
        reference: log pi_t, fp32 [num_triplets, len(roles)], or None.
        identical: Bool [num_triplets]: y' = y.
        stalled: Bool [num_triplets]: y' = y0 as well.
    """

    rows: Rows
    roles: tuple[str, ...]
    num_triplets: int
    lengths: Tensor
    reference: Tensor | None
    identical: Tensor
    stalled: Tensor


def plan_micro_batches(
    triplets: Sequence[Triplet],
    roles: tuple[str, ...],
    micro_batch_size: int,
    replica: int,
    replicas: int,
    multiple: int,
) -> tuple[list[MicroBatch], int]:
    """The micro-batches of one replica; every replica gets as many, and all rows of the step are equally long.

    Args:
        triplets: Of the global batch, in order, the same on every rank; at least one.
        roles: Roles to compute.
        micro_batch_size: Triplets in a micro-batch.
        replica: This rank's place in DP.
        replicas: DP size.
        multiple: Row lengths are a multiple of this.

    Returns:
        The micro-batches and the row length.
    """
    length = row_length([pair for triplet in triplets for pair in triplet.pairs()], multiple)
    parts = [triplets[i : i + micro_batch_size] for i in range(0, len(triplets), micro_batch_size)]
    parts += [[]] * (-len(parts) % replicas)
    return [_micro_batch(part, roles, micro_batch_size, length) for part in parts[replica::replicas]], length


def _micro_batch(triplets: Sequence[Triplet], roles: tuple[str, ...], size: int, length: int) -> MicroBatch:
    shape = (len(triplets), len(roles))
    lengths = torch.tensor([[len(t.responses[role]) for role in roles] for t in triplets], dtype=torch.float32)
    reference = None
    if any(triplet.reference for triplet in triplets):
        values = [[(t.reference or {})[role] for role in roles] for t in triplets]
        reference = torch.tensor(values, dtype=torch.float32)
    return MicroBatch(
        rows=pad_rows([pair for t in triplets for pair in t.pairs()], size * len(roles), length),
        roles=roles,
        num_triplets=len(triplets),
        lengths=lengths.reshape(shape),
        reference=reference,
        identical=_same(triplets, "annotated", "synthetic"),
        stalled=_same(triplets, "synthetic", "proto"),
    )


def _same(triplets: Sequence[Triplet], first: str, second: str) -> Tensor:
    """Bool [n]: whether two roles are the same tokens; False where a role is not computed."""
    flags = [
        first in t.responses and second in t.responses and list(t.responses[first]) == list(t.responses[second])
        for t in triplets
    ]
    return torch.tensor(flags, dtype=torch.bool)
