"""What a network computes, in the field's terms: one record for every family. Nothing here knows a family's name.

No torch: the driver checks a checkpoint before any stage starts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_tspin.config import ParallelSection
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.errors import InputError

VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class Norm:
    """How hidden states are normalised."""

    kind: Literal["rms", "layer"]
    """`rms` has a weight; `layer` takes the mean off first, and has a bias too."""
    eps: float
    unit_offset: bool = False
    """The stored weight is the true one minus 1 (Gemma)."""


@dataclass(frozen=True)
class Rope:
    """A rotary position embedding."""

    settings: Mapping[str, Any]
    """Under transformers 5's names: `rope_type`, `rope_theta` and what the type takes."""
    columns: int
    """Columns of a head that are rotated, from the first one on."""
    layer_type: str | None = None
    """The name of these settings in the HF config, where it has several."""

    def __repr__(self) -> str:
        return f"{dict(self.settings)} of {self.columns} columns"


@dataclass(frozen=True)
class Experts:
    """A mixture of experts instead of one MLP."""

    count: int
    per_token: int
    ffn_hidden_size: int
    normalised: bool
    """The chosen experts' probabilities are scaled to sum to 1."""


@dataclass(frozen=True)
class LayerFacts:
    """In what layers of one network differ."""

    window: int | None = None
    """Keys that a query sees, itself included."""
    rope: int | None = 0
    """Index into `Architecture.ropes`; None: queries and keys are not rotated."""
    sparse: bool = False
    """Its MLP is a mixture of experts."""


@dataclass(frozen=True)
class Architecture:
    """A decoder-only network. Sizes count units, not bytes."""

    family: str
    """`model_type` of the HF config; decides about names of tensors and nothing else."""
    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    """Of dense layers."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    """Positions for which it computes what its config says; longer rows are refused."""
    layers: tuple[LayerFacts, ...]
    norm: Norm
    ropes: tuple[Rope, ...]
    softmax_scale: float
    """What scores are multiplied with; a rope's attention factor comes on top."""
    tied_embeddings: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    """The MLP is down(activation(gate) * up), else down(activation(up))."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Of the projection after attention."""
    mlp_bias: bool = False
    query_key_norm: Literal["none", "head", "all"] = "none"
    """Queries and keys are normalised before they are rotated: each head by itself, or all heads as one vector."""
    norm_before: bool = True
    """A norm before attention and one before the MLP."""
    norm_after: bool = False
    """A norm of attention's output and one of the MLP's, before they are added to the residual."""
    parallel_residual: bool = False
    """Attention and MLP both read the layer's input."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """What attention's and the MLP's outputs are multiplied with before they are added."""
    logits_scale: float = 1.0
    attention_cap: float | None = None
    """Scores become cap * tanh(score / cap)."""
    logits_cap: float | None = None
    experts: Experts | None = None
    """Of sparse layers."""
    folder: Path = Path()
    """Where the HF checkpoint lies; rope frequencies are computed from its config by transformers' functions."""

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def norm_bias(self) -> bool:
        """Whether norms have biases."""
        return self.norm.kind == "layer"

    @property
    def shortest_window(self) -> int | None:
        """Keys that a query sees where it sees the fewest; None if every layer sees all."""
        return min((layer.window for layer in self.layers if layer.window is not None), default=None)

    def differences(self, other: "Architecture") -> dict[str, tuple[Any, Any]]:
        """Facts that differ, by name, the folder aside: this one's value and the other's."""
        names = [name for name in vars(self) if name != "folder"]
        return {
            name: (getattr(self, name), getattr(other, name))
            for name in names
            if getattr(self, name) != getattr(other, name)
        }

    def at(self, folder: Path) -> "Architecture":
        """The same with another folder."""
        return replace(self, folder=folder)

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """Vocabulary rows of the embedding and the head, so that each TP rank holds the same number.

        A multiple of 128 that does not depend on TP as long as TP is a power of two up to 128.
        """
        return padded_size(self.vocab_size, VOCABULARY_MULTIPLE, tensor_parallel_size)

    def check_length(self, seq_length: int) -> None:
        """Refuses rows longer than the positions that the policy was made for.

        Raises:
            InputError: `seq_length` is larger than `max_positions`.
        """
        if seq_length > self.max_positions:
            raise InputError(
                f"data.seq_length = {seq_length} is more than the {self.max_positions} positions "
                f"({self._positions_key}) of {self.folder}; lower --seq-length"
            )

    @property
    def _positions_key(self) -> str:
        kinds = {rope.settings["rope_type"] for rope in self.ropes}
        return "original_max_position_embeddings" if "longrope" in kinds else "max_position_embeddings"

    def check_layout(self, parallel: ParallelSection, training: bool = False) -> None:
        """Refuses a layout that does not fit the network.

        Args:
            parallel: The layout.
            training: Of a policy in training mode, where megatron-core wants experts' tokens split over TP.

        Raises:
            InputError: TP does not divide the heads, the KV heads or the MLP, or PP the layers, or EP the experts; all
                in one message.
        """
        tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        pieces = pipeline * parallel.num_virtual_stages
        virtual = " x virtual_pipeline_model_parallel_size" if parallel.num_virtual_stages > 1 else ""
        divisors = [
            ("tensor_model_parallel_size", tensor, "attention heads", self.num_heads),
            ("tensor_model_parallel_size", tensor, "MLP columns", self.ffn_hidden_size),
            (f"pipeline_model_parallel_size{virtual}", pieces, "layers", self.num_layers),
        ]
        if self.experts is not None:
            divisors.append(
                ("tensor_model_parallel_size", tensor, "MLP columns of an expert", self.experts.ffn_hidden_size)
            )
        if self.experts is not None:
            experts = parallel.expert_model_parallel_size
            divisors.append(("expert_model_parallel_size", experts, "experts", self.experts.count))
        refused = [
            f"parallel.{name} = {size} does not divide the {count} {what} of {self.folder}; use a divisor of {count}"
            for name, size, what, count in divisors
            if count % size
        ]
        refused += self._key_value_heads_problems(tensor)
        if training and self.experts is not None and tensor > 1 and not parallel.sequence_parallel:
            refused.append(
                f"parallel.sequence_parallel = False: {self.folder} has experts, which train at "
                f"tensor_model_parallel_size = {tensor} only with their tokens split; add --sequence-parallel"
            )
        if self.experts is None and parallel.expert_model_parallel_size > 1:
            refused.append(
                f"parallel.expert_model_parallel_size = {parallel.expert_model_parallel_size}: {self.folder} has no "
                "experts; leave --expert-model-parallel-size out"
            )
        if refused:
            raise InputError("\n".join(refused))

    def _key_value_heads_problems(self, tensor: int) -> list[str]:
        """Ranks hold the same number of key-value heads, or as many ranks share each of them."""
        name, count = "parallel.tensor_model_parallel_size", self.num_kv_heads
        if count % tensor and tensor % count:
            return [
                f"{name} = {tensor} neither divides the {count} key-value heads of {self.folder} nor is a multiple of "
                f"them; use a divisor or a multiple of {count}"
            ]
        if tensor > count and self.query_key_norm == "all":
            return [
                f"{name} = {tensor} is more than the {count} key-value heads of {self.folder}, whose keys are "
                f"normalised over all heads; use a divisor of {count}"
            ]
        return []

    def check_precision(self, parallel: ParallelSection, precision: PrecisionSection) -> None:
        """Refuses FP8 on sizes that its kernels do not take.

        Raises:
            InputError: A linear layer's size on one TP rank is not a multiple of what FP8 needs, or all layers are to
                stay out of FP8; all in one message.
        """
        if precision.fp8 is None:
            return
        if self.experts is not None:
            raise InputError(
                f"precision.fp8 = {precision.fp8} is not implemented for mixtures of experts, whose numbers of "
                f"tokens are no multiples of what FP8 needs ({self.folder}); leave --fp8-format out"
            )
        tensor, unit = parallel.tensor_model_parallel_size, precision.features_multiple
        heads = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        sizes = {
            "hidden_size": self.hidden_size,
            "rows of queries, keys and values on a TP rank": heads // tensor,
            "columns of the attention's output on a TP rank": self.num_heads * self.head_dim // tensor,
            "columns of the MLP on a TP rank": self.ffn_hidden_size // tensor,
        }
        refused = [
            f"precision.fp8 = {precision.fp8} needs sizes that are multiples of {unit}: {what} of {self.folder} is "
            f"{size} at tensor_model_parallel_size = {tensor}; leave --fp8-format out"
            f"{', or lower tensor_model_parallel_size' if tensor > 1 else ''}"
            for what, size in sizes.items()
            if size % unit
        ]
        if precision.num_bf16_layers >= self.num_layers:
            refused.append(
                f"num_layers_at_start_in_bf16 + num_layers_at_end_in_bf16 = {precision.num_bf16_layers} leave none of "
                f"the {self.num_layers} layers of {self.folder} in FP8; lower them, or leave --fp8-format out"
            )
        if refused:
            raise InputError("\n".join(refused))


def padded_size(size: int, multiple: int, tensor_parallel_size: int) -> int:
    """The size, rounded up so that each TP rank holds the same number of rows, and all a multiple of `multiple`."""
    unit = math.lcm(multiple, tensor_parallel_size)
    return math.ceil(size / unit) * unit
