"""This project's engine: the policy itself, over TP and PP, with continuous batching.

A replica has a fixed number of slots. Each step is one packed row: the next token of every slot that is at work, and
the whole prompts of those that have just been given one; what these begin with in common is there once. A slot whose
answer ends takes the next prompt.

Slots are divided into groups that take turns, at least as many as pipeline stages: while one stage computes a group's
step, the others compute those of other groups. What a step has chosen is read (`_Flight.settle`) only when the group's
next step needs it; on a GPU a step later still, so that the host prepares a step while the device is at the one before.
"""

import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_tspin.data.stops import Stops
from megatron_tspin.errors import DivergenceError
from megatron_tspin.generation.backends.backend import Answer, PromptRequest
from megatron_tspin.generation.backends.cache_size import CacheSize
from megatron_tspin.generation.sampling import Decoding, choose, uniforms
from megatron_tspin.heartbeat import beat
from megatron_tspin.models.block_cache import BlockCache, CachedSequence, StepLayout, blocks_for
from megatron_tspin.models.policy import PolicyModel, weight_bytes
from megatron_tspin.models.prompt_row import prompt_row
from megatron_tspin.parallel import Topology, broadcast_within_policy
from megatron_tspin.platform import device, free_bytes, has_cuda, to_device

PROMPT_TOKENS = 2048
"""Most prompt tokens of a step that has more than one prompt: what bounds its activations."""

_PACKED_SHARE = 0.25
"""Of the free memory, for a copy of the weights that is faster to compute with."""


class Engine:
    """Answers prompts. All ranks of a replica call it with the same arguments.

    Args:
        model: This rank's part of the policy.
        topology: The layout. Sequence parallelism must be off: one token cannot be split over TP.
        stops: Where an answer ends.
        size: Slots of the replica and room for their keys and values.
        lag: Steps of a group that are under way before the first of them is read. Default: one on a GPU, else none.
    """

    def __init__(
        self, model: PolicyModel, topology: Topology, stops: Stops, size: CacheSize, lag: int | None = None
    ) -> None:
        self.facts: dict[str, Any] = {}
        self._model = model
        self._topology = topology
        self._stops = stops
        self._size = size
        self._lag = int(has_cuda()) if lag is None else lag
        self._sent: deque[tuple[Any, Tensor]] = deque()
        if weight_bytes(model) < _PACKED_SHARE * free_bytes():
            model.pack_weights()

    def close(self) -> None:
        """Gives memory back; nothing else outlives `answers`."""
        self._model.unpack_weights()

    def answers(self, requests: Sequence[PromptRequest], decoding: Decoding) -> Generator[tuple[int, Answer]]:
        """See `Backend.answers`."""
        if not requests:
            return
        waiting = deque(requests)
        lengths = [len(request.ids) + decoding.max_new_tokens for request in requests]
        share = self._model.config.packed_attention != "thd"  # Transformer Engine's has no such rows
        groups = [_Group(*size, share) for size in self._size.divided(lengths, self._topology.pp_size)]
        try:
            while waiting or any(group.busy for group in groups):
                for group in groups:
                    while len(group.flights) > (self._lag if group.live else 0):
                        yield from group.settle(self._stops)
                    group.admit(waiting, decoding)
                    if group.live:
                        beat()
                        group.flights.append(self._step(group, decoding))
        finally:  # all ranks come here after the same step
            for flight in (flight for group in groups for flight in group.flights):
                flight.arrived()
            self._wait_for_sent(0)

    @torch.no_grad()
    def _step(self, group: "_Group", decoding: Decoding) -> "_Flight":
        """Runs the group's next tokens through this stage; the last stage chooses and tells the others."""
        tokens, layout = group.next_tokens()
        output = self._forward(tokens, layout)
        result = torch.empty(2, len(group.live), dtype=torch.float64, device=device())
        if self._topology.is_last_pipeline_stage:
            numbers = to_device(np.array([row.uniforms[row.position] for row in group.live]))
            result[0], result[1] = choose(output, numbers, decoding, self._model.vocabulary_shard())
        # One rank tells the others, whose arithmetic may have rounded otherwise.
        work = broadcast_within_policy(result, self._topology)
        for row in group.live:
            row.position += 1
        flight = _Flight(result, list(group.live), work)
        group.live = [row for row in group.live if row.position < decoding.max_new_tokens]
        return flight

    def _forward(self, tokens: Tensor, layout: StepLayout) -> Tensor:
        """This stage's output: hidden states [tokens, 1, h], which are on their way, or this rank's logits."""
        topology, config = self._topology, self._model.config
        if not topology.is_first_pipeline_stage:
            hidden = torch.empty(tokens.shape[1], 1, config.hidden_size, dtype=config.params_dtype, device=device())
            dist.recv(hidden, group=topology.pp_group, group_src=topology.pp_rank - 1)
            self._model.set_input_tensor(hidden)
        output: Tensor = self._model(tokens, layout.position_ids, layout=layout)
        if not topology.is_last_pipeline_stage:
            output = output.contiguous()
            sending = dist.isend(output, group=topology.pp_group, group_dst=topology.pp_rank + 1)
            self._sent.append((sending, output))
            self._wait_for_sent(topology.pp_size)
        return output

    def _wait_for_sent(self, left: int) -> None:
        """Until no more than so many hidden states are on their way."""
        while len(self._sent) > left:
            self._sent.popleft()[0].wait()


@dataclass(eq=False)
class _Row:
    """A slot at work."""

    request: PromptRequest
    uniforms: NDArray[np.float64]
    reserved: int
    """Blocks that its longest answer takes."""
    answer: Answer = field(default_factory=Answer)
    sequence: CachedSequence = field(default_factory=CachedSequence)
    position: int = 0
    """Of the answer's tokens, the next one that is to be chosen; those under way have been."""


@dataclass
class _Flight:
    """A step under way: token ids and log-probs, float64 [2, rows], of these rows."""

    result: Tensor
    rows: list[_Row]
    work: Any
    """The collective that brings the result; None where it is there."""

    def arrived(self) -> Tensor:
        """The result, which a GPU's stream may still be computing."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.result


class _Group:
    """Slots that take their steps together.

    Attributes:
        live: Rows of the next step: those that, as far as is known, have not ended.
        flights: Steps under way.
    """

    def __init__(self, slots: int, blocks: int, share: bool) -> None:
        self.live: list[_Row] = []
        self.flights: deque[_Flight] = deque()
        self._held: list[_Row] = []  # that have not given their blocks back
        self._slots = slots
        self._share = share
        self._cache = BlockCache(blocks)

    @property
    def busy(self) -> bool:
        """Whether answers are under way."""
        return bool(self.live or self.flights)

    def admit(self, waiting: deque[PromptRequest], decoding: Decoding) -> None:
        """Gives free slots prompts, while there is room for their longest answers."""
        tokens, reserved = 0, sum(row.reserved for row in self._held)
        while waiting and len(self._held) < self._slots:
            request = waiting[0]
            blocks = blocks_for(len(request.ids) + decoding.max_new_tokens)
            tokens += len(request.ids)
            reserved += blocks
            if reserved > self._cache.blocks or tokens > max(PROMPT_TOKENS, len(request.ids)):
                return
            row = _Row(waiting.popleft(), uniforms(request.seed, decoding.max_new_tokens), blocks)
            self.live.append(row)
            self._held.append(row)

    def next_tokens(self) -> tuple[Tensor, StepLayout]:
        """The row of the next step, int64 [1, tokens], and its layout: new prompts are last."""
        known = [row for row in self.live if row.sequence.length]
        ids, prompts = prompt_row([row.request.ids for row in self.live[len(known) :]], self._share)
        tokens = torch.cat((self._last_tokens(known), to_device(ids)))
        return tokens[None], self._cache.step([row.sequence for row in self.live], prompts)

    def _last_tokens(self, rows: Sequence[_Row]) -> Tensor:
        """The token that each row's answer ends with so far, int64 [rows]; the host need not know it yet."""
        if not self.flights:
            return to_device(np.array([row.answer.ids[-1] for row in rows], dtype=np.int64))
        before = self.flights[-1]
        place = {id(row): number for number, row in enumerate(before.rows)}
        where = to_device(np.array([place[id(row)] for row in rows], dtype=np.int64))
        return before.arrived()[0].index_select(0, where).long()

    def settle(self, stops: Stops) -> Iterator[tuple[int, Answer]]:
        """Reads the oldest step under way; yields the answers that it completed.

        Raises:
            DivergenceError: A log-prob is not finite; on every rank, as all read the same.
        """
        flight = self.flights.popleft()
        ids, log_probs = flight.arrived().tolist()
        if not all(map(math.isfinite, log_probs)):
            raise DivergenceError("the policy's log-probs are not finite: its weights hold NaN or infinity")
        ended = []
        for row, token, log_prob in zip(flight.rows, ids, log_probs, strict=True):
            if row.answer.ended:  # it ended in a step before, which was not known when this one began
                continue
            row.answer.ids.append(int(token))
            row.answer.log_probs.append(log_prob)
            row.answer.ended = stops.end(row.answer.ids)
            if row.answer.ended or len(row.answer.ids) == len(row.uniforms):
                ended.append(row)
        self._release(ended)
        for row in ended:
            yield row.request.index, row.answer

    def _release(self, rows: Sequence[_Row]) -> None:
        for row in rows:
            self._cache.release(row.sequence)
        self.live = [row for row in self.live if row not in rows]
        self._held = [row for row in self._held if row not in rows]
        self._cache.gather([row.sequence for row in self._held])
