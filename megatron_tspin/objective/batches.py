"""From the triplets of a global batch to the micro-batches of one replica."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tspin.models.row_layout import WHOLE_ROW, ContextShare
from megatron_tspin.objective.packing import Packing, Shape, WorkModel, plan_rows
from megatron_tspin.objective.rows import BundleIds, Pair, Rows, pack_row, pad_rows, row_length


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

    def shape(self) -> Shape:
        """Its lengths."""
        return Shape(len(self.prompt), tuple(len(response) for response in self.responses.values()))

    def bundles(self, share_prompts: bool) -> list[BundleIds]:
        """The prompt with all responses, or with each."""
        responses = list(self.responses.values())
        return [(self.prompt, responses)] if share_prompts else [(self.prompt, [each]) for each in responses]

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


@dataclass(frozen=True)
class BatchPlanner:
    """Turns the triplets of a global batch into the micro-batches of one replica, by the configured layout of rows.

    Attributes:
        packing: How rows are packed; None pads them, a row a response.
        work: Prices a triplet, to balance packed rows.
        roles: Roles to compute.
        micro_batch_size: Triplets in a padded micro-batch.
        multiple: Row lengths are multiples of this.
        replica: This rank's place in DP.
        replicas: DP size.
        context: This rank's place in CP.
        diagnostics: See `ResponseTargets`.
    """

    packing: Packing | None
    work: WorkModel
    roles: tuple[str, ...]
    micro_batch_size: int
    multiple: int = 1
    replica: int = 0
    replicas: int = 1
    context: ContextShare = WHOLE_ROW
    diagnostics: bool = False

    def plan(self, triplets: Sequence[Triplet]) -> list[MicroBatch]:
        """The micro-batches of this replica; every replica gets the same number.

        Args:
            triplets: Of the global batch, in order, the same on every rank; at least one.
        """
        return self._padded(triplets) if self.packing is None else self._packed(triplets, self.packing)

    def _packed(self, triplets: Sequence[Triplet], packing: Packing) -> list[MicroBatch]:
        shapes = [triplet.shape() for triplet in triplets]
        planned = plan_rows(shapes, packing, self.work, self.replicas)[self.replica]
        return [
            self._micro_batch(
                members := [triplets[i] for i in row.members],
                pack_row(
                    [bundle for triplet in members for bundle in triplet.bundles(packing.share_prompts)],
                    row.length,
                    self.context,
                    self.diagnostics,
                ),
            )
            for row in planned
        ]

    def _padded(self, triplets: Sequence[Triplet]) -> list[MicroBatch]:
        size = self.micro_batch_size
        length = row_length([pair for triplet in triplets for pair in triplet.pairs()], self.multiple)
        parts = [triplets[i : i + size] for i in range(0, len(triplets), size)]
        parts += [[]] * (-len(parts) % self.replicas)
        return [
            self._micro_batch(
                part,
                pad_rows([pair for t in part for pair in t.pairs()], size * len(self.roles), length, self.diagnostics),
            )
            for part in parts[self.replica :: self.replicas]
        ]

    def _micro_batch(self, triplets: Sequence[Triplet], rows: Rows) -> MicroBatch:
        shape = (len(triplets), len(self.roles))
        lengths = torch.tensor([[len(t.responses[role]) for role in self.roles] for t in triplets], dtype=torch.float32)
        reference = None
        if any(triplet.reference for triplet in triplets):
            values = [[(t.reference or {})[role] for role in self.roles] for t in triplets]
            reference = torch.tensor(values, dtype=torch.float32)
        return MicroBatch(
            rows=rows,
            roles=self.roles,
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
