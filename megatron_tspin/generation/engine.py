"""Batched generation with a key-value cache, on the policy itself, over TP and PP.

Prompts of a batch are padded on the left, so that all rows write the same slot of the cache; a mask hides the padding
and position ids count from each row's own first token. Rows that ended leave the batch once half of it has.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_tspin.errors import DivergenceError
from megatron_tspin.generation.sampling import Decoding, choose
from megatron_tspin.heartbeat import beat
from megatron_tspin.models.attention import KeyValueCache
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.parallel import Topology, broadcast_within_policy
from megatron_tspin.platform import device


@dataclass
class Answer:
    """A response while it grows, and when it is complete."""

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ended: bool = False


class Engine:
    """Answers batches of prompts. All ranks of a replica call it with the same arguments.

    Args:
        model: This rank's part of the policy.
        topology: The layout. Sequence parallelism must be off: one token cannot be split over TP.
        stop_ids: A response ends with the first of these.
    """

    def __init__(self, model: PolicyModel, topology: Topology, stop_ids: Collection[int]) -> None:
        self._model = model
        self._topology = topology
        self._stop_ids = stop_ids

    def answer(
        self, prompts: Sequence[Sequence[int]], uniforms: Sequence[NDArray[np.float64]], decoding: Decoding
    ) -> list[Answer]:
        """Answers a batch.

        Args:
            prompts: Token ids, one or more each.
            uniforms: Random numbers of each prompt, one a position; not read when greedy.
            decoding: How to choose tokens.

        Returns:
            One answer a prompt, in order, on every rank of the replica.

        Raises:
            DivergenceError: A log-prob is not finite.
        """
        with torch.no_grad():
            longest = max(len(prompt) for prompt in prompts)
            caches = self._model.set_caches(longest + decoding.max_new_tokens)
            try:
                batch = _Batch(prompts, uniforms, longest, caches)
                return self._run(batch, decoding)
            finally:
                self._model.set_caches(None)

    def _run(self, batch: "_Batch", decoding: Decoding) -> list[Answer]:
        tokens = batch.prompt_tokens
        for position in range(decoding.max_new_tokens):
            beat()
            chosen, log_probs = self._next_tokens(batch, tokens, position, decoding)
            batch.record(chosen, log_probs, self._stop_ids)
            if not batch.live.any():
                break
            tokens = batch.compact(torch.tensor(chosen, device=device()))[:, None]
        return batch.answers

    def _next_tokens(
        self, batch: "_Batch", tokens: Tensor, position: int, decoding: Decoding
    ) -> tuple[list[int], list[float]]:
        """Runs tokens [b, s] through the pipeline and chooses the next one of each row, the same on all ranks.

        One rank chooses and tells the others: should the TP ranks' logits differ by rounding, each would go on with
        tokens of its own, and their caches would hold parts of different answers.
        """
        logits = self._forward(tokens, batch.position_ids(tokens.shape[1]), batch.mask(tokens.shape[1]))
        rows = tokens.shape[0]
        result = torch.zeros(2, rows, dtype=torch.float64, device=device())
        if logits is not None and self._topology.tp_rank == 0:
            chosen, log_probs = choose(logits, batch.uniforms(position), decoding)
            result[0], result[1] = chosen.double(), log_probs.double()
        ids, values = broadcast_within_policy(result, self._topology).tolist()
        if not all(map(math.isfinite, values)):  # every rank has the same values, so that all of them stop
            raise DivergenceError("the policy's log-probs are not finite: its weights hold NaN or infinity")
        return [int(token) for token in ids], values

    def _forward(self, tokens: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor | None:
        """One pass through all pipeline stages; logits [b, V] on the last one, None elsewhere."""
        topology, config = self._topology, self._model.config
        if not topology.is_first_pipeline_stage:
            hidden = torch.empty(
                tokens.shape[1], tokens.shape[0], config.hidden_size, dtype=config.params_dtype, device=device()
            )
            dist.recv(hidden, group=topology.pp_group, group_src=topology.pp_rank - 1)
            self._model.set_input_tensor(hidden)
        output: Tensor = self._model(tokens, position_ids, mask, next_token_logits=True)
        if topology.is_last_pipeline_stage:
            return output
        dist.send(output.contiguous(), group=topology.pp_group, group_dst=topology.pp_rank + 1)
        return None


class _Batch:
    """Bookkeeping of a batch: which rows are left, where their padding ends, what they said."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Sequence[NDArray[np.float64]],
        longest: int,
        caches: list[KeyValueCache],
    ) -> None:
        self.answers = [Answer() for _ in prompts]
        self._caches = caches
        self._rows = list(range(len(prompts)))  # row of the batch -> prompt
        self._uniforms = torch.from_numpy(np.stack([np.asarray(values) for values in uniforms])).to(device())
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self.prompt_tokens = torch.tensor(padded, device=device())
        self._padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device())
        self._filled = 0
        self.live = torch.ones(len(prompts), dtype=torch.bool)

    def uniforms(self, position: int) -> Tensor:
        """Random numbers float64 [b] for a position of the responses."""
        return self._uniforms[:, position]

    def position_ids(self, length: int) -> Tensor:
        """Position ids int64 [b, length] of the tokens about to be run."""
        slots = torch.arange(self._filled, self._filled + length, device=device())
        return (slots[None, :] - self._padding[:, None]).clamp(min=0)

    def mask(self, length: int) -> Tensor:
        """Bool [b, 1, length, slots filled after this pass], True where a token sees a slot; advances the slots."""
        total = self._filled + length
        queries = torch.arange(self._filled, total, device=device())[None, :, None]
        keys = torch.arange(total, device=device())[None, None, :]
        seen = (keys <= queries) & (keys >= self._padding[:, None, None])
        self._filled = total
        # A padding token sees itself: a row of the softmax without any key would be NaN.
        return (seen | (keys == queries))[:, None]

    def record(self, chosen: list[int], log_probs: list[float], stop_ids: Collection[int]) -> None:
        """Adds the tokens of the rows that have not ended."""
        for row, (token, log_prob) in enumerate(zip(chosen, log_probs, strict=True)):
            if self.live[row]:
                answer = self.answers[self._rows[row]]
                answer.ids.append(token)
                answer.log_probs.append(log_prob)
                answer.ended = token in stop_ids
                self.live[row] = not answer.ended

    def compact(self, tokens: Tensor) -> Tensor:
        """Drops the rows that ended if they are half of the batch; returns the tokens [b] of the rows kept."""
        if int(self.live.sum()) * 2 > len(self._rows):
            return tokens
        keep = self.live.nonzero()[:, 0].to(device())
        for cache in self._caches:
            cache.keep_rows(keep)
        self._rows = [self._rows[row] for row in keep.tolist()]
        self._padding, self._uniforms = self._padding[keep], self._uniforms[keep]
        self.live = torch.ones(len(self._rows), dtype=torch.bool)
        return tokens[keep]
