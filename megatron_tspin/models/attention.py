"""Core attention for megatron-core's layers, readable and the same on every platform.

megatron-core's local attention forks CUDA's random state and its local norm refuses sequence parallelism; these two
do neither. Both come in through the layer spec (`models/layer_specs.py`).
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_tspin.models.block_cache import StepLayout
from megatron_tspin.models.packed_attention import BACKENDS, PackedAttention
from megatron_tspin.models.rotary import rotate
from megatron_tspin.models.row_layout import RowLayout
from megatron_tspin.models.scores import Scores, attend


class CausalAttention(torch.nn.Module):
    """Scaled dot-product attention.

    With a `RowLayout` the one row is a packed one, attended to by a backend of `packed_attention`; with a `StepLayout`
    it is a step of generation, over a key-value cache. Otherwise torch's SDPA: without a mask rows are causal (padding
    on the right is never attended to); with a mask, `attention_mask` is boolean [b, 1, queries, keys], True where a
    query sees a key, and has to contain causality; the layer's window comes on top.
    """

    def __init__(self, config: Any, layer_number: int, scores: Scores, **_: Any) -> None:
        """Takes what megatron-core's attention hands to a core attention; the rest of it does not concern this one."""
        super().__init__()
        self.layer_number = layer_number
        self.scores = scores
        self.packed: PackedAttention = BACKENDS[config.packed_attention]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *_: Any,
        attention_bias: Tensor | None = None,
        packed_seq_params: RowLayout | StepLayout | None = None,
        **__: Any,
    ) -> Tensor:
        """Attends.

        Args:
            query: [s, b, heads, d].
            key: [s, b, key groups, d].
            value: [s, b, key groups, d].
            attention_mask: See the class.
            attention_bias: No bias, but how this layer's rope rotates queries and keys, if it does: see `PolicyLayer`.
            packed_seq_params: The layout of a packed row, of which s tokens are on this rank, or of a step; b is 1.

        Returns:
            [s, b, heads * d].
        """
        if attention_bias is not None:
            query, key = rotate(query, attention_bias), rotate(key, attention_bias)
        if isinstance(packed_seq_params, StepLayout):
            return self._of_step(query, key, value, packed_seq_params)
        if packed_seq_params is not None:
            return self._over_packed_row(query, key, value, packed_seq_params)
        repeats = query.shape[2] // key.shape[2]
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, heads or key groups, s, d]
        window = self.scores.window
        if window is not None and k.shape[2] > window:
            recent = window_mask(q.shape[2], k.shape[2], window, q.device)
            attention_mask = recent if attention_mask is None else attention_mask & recent
        if repeats > 1 and attention_mask is not None:
            return self._by_groups(q, k, v, attention_mask, repeats)
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = attend(q, k, v, attention_mask, self.scores)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _by_groups(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, repeats: int) -> Tensor:
        """The heads of a key group as more queries of one head, so that no key and no value is copied."""
        rows, heads, queries, width = q.shape
        grouped = q.reshape(rows, heads // repeats, repeats * queries, width)
        out = attend(grouped, k, v, mask.repeat(1, 1, repeats, 1), self.scores)
        return out.reshape(rows, heads, queries, width).permute(2, 0, 1, 3).reshape(queries, rows, -1)

    def _of_step(self, query: Tensor, key: Tensor, value: Tensor, layout: StepLayout) -> Tensor:
        out = layout.attend(self.layer_number, query[:, 0], key[:, 0], value[:, 0], self.scores, self.packed)
        return out.reshape(query.shape[0], 1, -1)

    def _over_packed_row(self, query: Tensor, key: Tensor, value: Tensor, layout: RowLayout) -> Tensor:
        if layout.context.size > 1:
            both = gather_from_sequence_parallel_region(torch.stack((key, value), dim=1), group=layout.context.group)
            key, value = both.index_select(0, layout.gathered_order.to(both.device)).unbind(1)
        out = self.packed(query[:, 0], key[:, 0], value[:, 0], layout, self.scores)
        return out.reshape(query.shape[0], 1, -1)


def window_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, queries, keys], True where the key is one of the last `window` positions, the query's own included.

    The last query is at the last key's position.
    """
    position = torch.arange(keys, device=device)
    distance = position[keys - queries :, None] - position[None, :]
    return ((distance >= 0) & (distance < window))[None, None]
