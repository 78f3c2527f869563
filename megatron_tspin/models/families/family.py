"""A family of models: how its config.json is read, and which tensors it has."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_tspin.models.architecture import Architecture, LayerFacts, Norm, Rope
from megatron_tspin.models.families.config_reader import ConfigReader
from megatron_tspin.models.families.rope_settings import read_rope
from megatron_tspin.models.families.table import EMBEDDING, OUTPUT_LAYER, Line, Tensor


@dataclass(frozen=True)
class Family:
    """All that is known of one `model_type`."""

    model_type: str
    read: Callable[[ConfigReader], Architecture]
    """Every key that it asks for counts as understood."""
    first: tuple[Line, ...]
    layer: tuple[Line, ...]
    last: tuple[Line, ...]
    neutral: Mapping[str, str] = field(default_factory=dict)
    """More keys that do not change what the network computes, each with the reason."""
    buffers: tuple[str, ...] = ()
    """Ends of names that old checkpoints store beside the weights."""

    @property
    def head(self) -> str:
        """The HF name of the output matrix."""
        return next(line.hf[0] for line in self.last if line.core == OUTPUT_LAYER) + ".weight"

    @property
    def embedding(self) -> str:
        """The HF name of the embedding."""
        return next(line.hf[0] for line in self.first if line.core == EMBEDDING) + ".weight"

    def tensors(self, architecture: Architecture) -> Iterator[Tensor]:
        """The table written out, in the network's order. Tied embeddings have no output layer of their own."""
        yield from _written_out(self.first, architecture)
        for layer, facts in enumerate(architecture.layers):
            mine = [line for line in self.layer if line.sparse in (None, facts.sparse)]
            yield from _written_out(mine, architecture, layer)
        yield from _written_out(
            [line for line in self.last if not (architecture.tied_embeddings and line.core == OUTPUT_LAYER)],
            architecture,
        )


def _written_out(lines: Any, architecture: Architecture, layer: int | None = None) -> Iterator[Tensor]:
    for line in lines:
        layout = line.layout(architecture)
        parts = [(".weight", layout)]
        if line.bias is not None and getattr(architecture, line.bias):
            parts.append((".bias", layout.bias()))
        experts = range(architecture.experts.count) if "{expert}" in line.core and architecture.experts else [None]
        for expert in experts:
            for suffix, part in parts:
                core, *hf = (name.format(layer=layer, expert=expert) + suffix for name in (line.core, *line.hf))
                yield Tensor(core, tuple(hf), part, layer, expert)


def read_sizes(
    reader: ConfigReader,
    silent_kv_heads: int | None = None,
    silent_head_dim: int | None = None,
    silently_tied: bool = False,
) -> dict[str, Any]:
    """What nearly all families call alike, as arguments of `Architecture`.

    Args:
        reader: Of the config.
        silent_kv_heads: Key-value heads where the config is silent; None: as many as heads.
        silent_head_dim: Columns of a head where the config is silent; None: the hidden size over the heads.
        silently_tied: Whether embeddings are tied where the config is silent.
    """
    found = {
        "vocab_size": reader.whole("vocab_size"),
        "hidden_size": reader.whole("hidden_size"),
        "ffn_hidden_size": reader.whole("intermediate_size"),
        "num_heads": reader.whole("num_attention_heads"),
        "max_positions": reader.whole("max_position_embeddings"),
        "tied_embeddings": reader.flag("tie_word_embeddings", silently_tied),
    }
    heads, hidden = found["num_heads"], found["hidden_size"]
    kv_heads = reader.whole("num_key_value_heads", silent_kv_heads) or heads
    head_dim = reader.whole("head_dim", silent_head_dim)
    if head_dim is None and hidden % heads:
        reader.inconsistent(
            f"num_attention_heads = {heads} does not divide hidden_size = {hidden}, and there is no head_dim"
        )
    if heads % kv_heads:
        reader.inconsistent(f"num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}")
    return {**found, "num_kv_heads": kv_heads, "head_dim": head_dim or max(hidden // heads, 1)}


def read_decoder(
    reader: ConfigReader,
    family: str,
    sizes: dict[str, Any],
    layers: Iterable[LayerFacts],
    rope: Rope | None = None,
    **facts: Any,
) -> Architecture:
    """An architecture of RMS norms, one rope and a gated MLP.

    Args:
        reader: Of the config.
        family: `Architecture.family`.
        sizes: Of `read_sizes`.
        layers: In their order.
        rope: Where it is not read as usual.
        facts: More of `Architecture`'s fields.
    """
    return Architecture(
        family=family,
        **sizes,
        layers=tuple(layers),
        norm=read_rms_norm(reader),
        ropes=(rope or read_rope(reader, sizes["head_dim"], sizes["max_positions"]),),
        softmax_scale=sizes["head_dim"] ** -0.5,
        activation=reader.activation("hidden_act", "silu"),
        **facts,
    )


def read_rms_norm(reader: ConfigReader, unit_offset: bool = False) -> Norm:
    """The norm of most families."""
    return Norm("rms", reader.number("rms_norm_eps"), unit_offset)
