"""megatron-core's decoder layer, and what the families of models do otherwise around its attention and its MLP."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

_Norm = Callable[..., torch.nn.Module]


@dataclass(frozen=True)
class LayerPlan:
    """What a layer does that megatron-core's does not."""

    rope: int | None = 0
    """Which of the ropes rotates queries and keys, if any."""
    norm_after: _Norm | None = None
    """Normalises attention's and the MLP's output before they join the residual."""
    residual_scale: float = 1.0
    """What these outputs are multiplied with."""
    parallel_residual: bool = False
    """The MLP reads the layer's input instead of what attention has made of it."""


class PolicyLayer(TransformerLayer):
    """A layer by plan. Hidden states are [s, b, h]."""

    def __init__(self, *args: Any, plan: LayerPlan, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plan = plan
        if plan.norm_after is not None:
            width, eps = self.config.hidden_size, self.config.layernorm_epsilon
            self.post_self_attn_layernorm = plan.norm_after(config=self.config, hidden_size=width, eps=eps)
            self.post_mlp_layernorm = plan.norm_after(config=self.config, hidden_size=width, eps=eps)
        if plan.norm_after is not None or plan.residual_scale != 1.0:
            self.self_attn_bda = self._joins("post_self_attn_layernorm")
            self.mlp_bda = self._joins("post_mlp_layernorm")
        self._layer_input: Tensor | None = None

    def _forward_attention(self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> Any:
        """As megatron-core's, given the rotations [2, ropes, s, b, 1, columns / 2] of all ropes.

        Its own way takes cosines and sines again in each layer. Ours goes by an argument that it hands through to the
        core attention.
        """
        if self.plan.parallel_residual:
            self._layer_input = hidden_states
        rotation = None if self.plan.rope is None else rotary_pos_emb[:, self.plan.rope]
        kwargs |= {"rotary_pos_emb": None, "attention_bias": rotation}
        return super()._forward_attention(hidden_states, *args, **kwargs)

    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor) -> Any:
        given, self._layer_input = self._layer_input, None
        return super()._forward_pre_mlp_layernorm(hidden_states if given is None else given)

    def _joins(self, norm: str) -> Callable[..., Any]:
        """In place of megatron-core's bias-dropout-add; nothing is ever dropped."""

        def join(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, _dropout: float) -> Tensor:
            output, bias = output_and_bias
            if bias is not None:
                output = output + bias
            if self.plan.norm_after is not None:
                output = getattr(self, norm)(output)
            if self.plan.residual_scale != 1.0:
                output = output * self.plan.residual_scale
            return residual + output

        return lambda _training, _fused: join
