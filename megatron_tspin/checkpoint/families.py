"""Which HF tensors make which megatron-core tensor: one table per family, read in both directions.

A core tensor on one TP rank is a concatenation of row (or column) ranges of HF tensors. `source_ranges` lists
those; loading copies along them from HF to core, exporting from core to HF. No torch here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from megatron_tspin.models.hf_config import Architecture


class Kind(Enum):
    """How a core tensor is laid out and split over TP."""

    REPLICATED = "the whole HF tensor on every TP rank"
    VOCABULARY = "rows of the vocabulary, padded with zero rows"
    QKV = "for each query group its q heads, k and v; a TP rank has an equal range of those rows"
    GATE_UP = "each TP rank has its rows of gate, then its rows of up"
    COLUMNS = "columns, which TP splits"


@dataclass(frozen=True)
class Template:
    """One line of a family's table; `{layer}` stands for the number of a layer in the whole network."""

    hf: tuple[str, ...]
    core: str
    kind: Kind


@dataclass(frozen=True)
class Weight:
    """A template for one layer, with the shapes that the architecture demands of the HF tensors."""

    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    core: str
    kind: Kind


@dataclass(frozen=True)
class SourceRange:
    """Rows (`dim` 0) or columns (`dim` 1) `start:stop` of the HF tensor number `source` of a weight."""

    source: int
    dim: int
    start: int
    stop: int


OUTPUT_LAYER = "output_layer.weight"
EMBEDDING = "embedding.word_embeddings.weight"
LM_HEAD = "lm_head.weight"
_HF, _CORE = "model.layers.{layer}.", "decoder.layers.{layer}."

_LLAMA = (
    Template(("model.embed_tokens.weight",), EMBEDDING, Kind.VOCABULARY),
    Template((_HF + "input_layernorm.weight",), _CORE + "input_layernorm.weight", Kind.REPLICATED),
    Template(
        tuple(_HF + f"self_attn.{part}_proj.weight" for part in "qkv"),
        _CORE + "self_attention.linear_qkv.weight",
        Kind.QKV,
    ),
    Template((_HF + "self_attn.o_proj.weight",), _CORE + "self_attention.linear_proj.weight", Kind.COLUMNS),
    Template((_HF + "post_attention_layernorm.weight",), _CORE + "pre_mlp_layernorm.weight", Kind.REPLICATED),
    Template((_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"), _CORE + "mlp.linear_fc1.weight", Kind.GATE_UP),
    Template((_HF + "mlp.down_proj.weight",), _CORE + "mlp.linear_fc2.weight", Kind.COLUMNS),
    Template(("model.norm.weight",), "decoder.final_layernorm.weight", Kind.REPLICATED),
    Template((LM_HEAD,), OUTPUT_LAYER, Kind.VOCABULARY),
)

FAMILIES: Mapping[str, tuple[Template, ...]] = MappingProxyType({"llama": _LLAMA, "mistral": _LLAMA})


def weights(architecture: Architecture) -> Iterator[Weight]:
    """The table of the architecture's family, written out for all its layers, in the network's order.

    Tied embeddings have no output layer of their own.
    """
    table = FAMILIES[architecture.family]
    per_layer = [template for template in table if "{layer}" in template.core]
    first = table.index(per_layer[0])
    yield from (_weight(template, architecture) for template in table[:first])
    for layer in range(architecture.num_layers):
        yield from (_weight(template, architecture, layer) for template in per_layer)
    for template in table[first + len(per_layer) :]:
        if not (architecture.tied_embeddings and template.core == OUTPUT_LAYER):
            yield _weight(template, architecture)


def _weight(template: Template, architecture: Architecture, layer: int = 0) -> Weight:
    return Weight(
        hf=tuple(name.format(layer=layer) for name in template.hf),
        shapes=_hf_shapes(template, architecture),
        core=template.core.format(layer=layer),
        kind=template.kind,
    )


def _hf_shapes(template: Template, architecture: Architecture) -> tuple[tuple[int, ...], ...]:
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    queries = architecture.num_heads * architecture.head_dim
    keys = architecture.num_kv_heads * architecture.head_dim
    match template.kind:
        case Kind.REPLICATED:
            return ((hidden,),)
        case Kind.VOCABULARY:
            return ((architecture.vocab_size, hidden),)
        case Kind.QKV:
            return ((queries, hidden), (keys, hidden), (keys, hidden))
        case Kind.GATE_UP:
            return ((ffn, hidden), (ffn, hidden))
        case Kind.COLUMNS:
            return ((hidden, queries if "self_attention" in template.core else ffn),)


def core_shape(weight: Weight, architecture: Architecture, tp_size: int) -> tuple[int, ...]:
    """Shape of the weight on one TP rank, padded vocabulary rows included."""
    first = weight.shapes[0]
    match weight.kind:
        case Kind.REPLICATED:
            return first
        case Kind.VOCABULARY:
            return (architecture.padded_vocab_size(tp_size) // tp_size, first[1])
        case Kind.COLUMNS:
            return (first[0], first[1] // tp_size)
        case Kind.QKV | Kind.GATE_UP:
            return (sum(shape[0] for shape in weight.shapes) // tp_size, first[1])


def source_ranges(weight: Weight, architecture: Architecture, tp_rank: int, tp_size: int) -> list[SourceRange]:
    """The HF ranges that follow each other in the weight on one TP rank.

    They all run along one dimension. Only a padded vocabulary has more core rows than its source_ranges fill.
    """
    match weight.kind:
        case Kind.REPLICATED:
            return [SourceRange(0, 0, 0, weight.shapes[0][0])]
        case Kind.VOCABULARY:
            size = architecture.padded_vocab_size(tp_size) // tp_size
            start, stop = (min(size * rank, architecture.vocab_size) for rank in (tp_rank, tp_rank + 1))
            return [SourceRange(0, 0, start, stop)] if stop > start else []
        case Kind.COLUMNS:
            size = weight.shapes[0][1] // tp_size
            return [SourceRange(0, 1, size * tp_rank, size * (tp_rank + 1))]
        case Kind.GATE_UP:
            size = weight.shapes[0][0] // tp_size
            return [SourceRange(source, 0, size * tp_rank, size * (tp_rank + 1)) for source in (0, 1)]
        case Kind.QKV:
            return _qkv_ranges(architecture, tp_rank, tp_size)


def _qkv_ranges(architecture: Architecture, tp_rank: int, tp_size: int) -> list[SourceRange]:
    """An equal range of rows of the interleaved tensor; it may begin and end inside a query group."""
    head, groups = architecture.head_dim, architecture.num_kv_heads
    queries = architecture.num_heads // groups * head
    size = groups * (queries + 2 * head) // tp_size
    first, last = size * tp_rank, size * (tp_rank + 1)
    found, row = [], 0
    for group in range(groups):
        for source, rows in enumerate((queries, head, head)):
            start, stop = max(first, row), min(last, row + rows)
            if start < stop:
                shift = group * rows - row
                found.append(SourceRange(source, 0, start + shift, stop + shift))
            row += rows
    return found
