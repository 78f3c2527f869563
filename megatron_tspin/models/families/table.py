"""Which HF tensors make which megatron-core tensor, as data; one generic function reads it in both directions.

A core tensor is one or more sections, one after another. A section is ranges of rows (or of columns) of HF tensors. TP
cuts each section into equal parts, of which a rank holds one; so gate and up are two sections, and the interleaved
queries, keys and values of all groups are one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from megatron_tspin.models.architecture import VOCABULARY_MULTIPLE, Architecture, padded_size

EMBEDDING = "embedding.word_embeddings"
OUTPUT_LAYER = "output_layer"


class Split(Enum):
    """How TP splits a core tensor."""

    NONE = "every rank holds it whole"
    ROWS = "each rank holds an equal part of each section"
    COLUMNS = "the same, where sections are of columns"


@dataclass(frozen=True)
class Range:
    """Rows `start:stop` (columns under `Split.COLUMNS`) of the HF tensor number `source` of a line."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class Section:
    """Ranges that follow each other, and rows of zeros up to a multiple of TP and of `multiple`."""

    ranges: tuple[Range, ...]
    multiple: int | None = None
    """None: no rows of zeros."""

    def size(self, tp_size: int) -> int:
        """Rows (or columns) in all."""
        size = sum(part.stop - part.start for part in self.ranges)
        return size if self.multiple is None else padded_size(size, self.multiple, tp_size)


@dataclass(frozen=True)
class Layout:
    """How HF tensors make one core tensor."""

    shapes: tuple[tuple[int, ...], ...]
    """Of the HF tensors."""
    sections: tuple[Section, ...]
    split: Split

    def bias(self) -> "Layout":
        """The layout of the biases of linears whose weights are laid out like this."""
        shapes = tuple(shape[:1] for shape in self.shapes)
        if self.split is Split.COLUMNS:
            return whole(*shapes[0])
        return Layout(shapes, self.sections, self.split)


@dataclass(frozen=True)
class Line:
    """One line of a family's table; `{layer}` and `{expert}` stand for numbers, counted through the whole network.

    Names come without `.weight` and `.bias`: a line stands for the weight, and for the bias where there is one.
    """

    core: str
    hf: tuple[str, ...]
    layout: Callable[[Architecture], Layout]
    bias: str | None = None
    """The flag of `Architecture` that says whether there is a bias."""
    sparse: bool | None = None
    """Only of layers with (True) or without (False) a mixture of experts."""


@dataclass(frozen=True)
class Tensor:
    """A line written out for one layer and one expert."""

    core: str
    hf: tuple[str, ...]
    layout: Layout
    layer: int | None = None
    expert: int | None = None

    def core_shape(self, tp_size: int) -> tuple[int, ...]:
        """Shape on one TP rank."""
        first, split = self.layout.shapes[0], self.layout.split
        size = sum(section.size(tp_size) for section in self.layout.sections)
        if split is Split.NONE:
            return (size, *first[1:])
        if split is Split.ROWS:
            return (size // tp_size, *first[1:])
        return (first[0], size // tp_size)

    @property
    def dim(self) -> int:
        """The dimension along which ranges follow each other."""
        return 1 if self.layout.split is Split.COLUMNS else 0

    def ranges(self, tp_rank: int, tp_size: int) -> Iterator[tuple[int, Range]]:
        """What the tensor of one TP rank is made of: where each range begins in it, and the range."""
        if self.layout.split is Split.NONE:
            tp_rank, tp_size = 0, 1
        begin = 0
        for section in self.layout.sections:
            size = section.size(tp_size) // tp_size
            first, last, row = size * tp_rank, size * (tp_rank + 1), 0
            for part in section.ranges:
                stop = row + part.stop - part.start
                low, high = max(first, row), min(last, stop)
                if low < high:
                    shift = part.start - row
                    yield begin + low - first, replace(part, start=low + shift, stop=high + shift)
                row = stop
            begin += size


def whole(*shape: int) -> Layout:
    """One HF tensor, on every rank."""
    return Layout((shape,), (Section((Range(0, 0, shape[0]),)),), Split.NONE)


def hidden(architecture: Architecture) -> Layout:
    """A norm of hidden states."""
    return whole(architecture.hidden_size)


def head(architecture: Architecture) -> Layout:
    """A norm of each head by itself."""
    return whole(architecture.head_dim)


def all_queries(architecture: Architecture) -> Layout:
    """A norm of all queries as one vector."""
    return _rows((architecture.num_heads * architecture.head_dim,))


def all_keys(architecture: Architecture) -> Layout:
    """A norm of all keys as one vector."""
    return _rows((architecture.num_kv_heads * architecture.head_dim,))


def vocabulary(architecture: Architecture) -> Layout:
    """Rows of the vocabulary, padded."""
    shape = (architecture.vocab_size, architecture.hidden_size)
    return Layout((shape,), (Section((Range(0, 0, shape[0]),), VOCABULARY_MULTIPLE),), Split.ROWS)


def qkv(architecture: Architecture) -> Layout:
    """Three tensors: queries, keys and values."""
    queries, keys = _heads(architecture)
    width = architecture.hidden_size
    shapes = ((queries, width), (keys, width), (keys, width))
    return Layout(shapes, (_by_group(architecture, (0, 0), (1, 0), (2, 0)),), Split.ROWS)


def fused_qkv(architecture: Architecture) -> Layout:
    """One tensor: all queries, then all keys, then all values."""
    queries, keys = _heads(architecture)
    section = _by_group(architecture, (0, 0), (0, queries), (0, queries + keys))
    return Layout(((queries + 2 * keys, architecture.hidden_size),), (section,), Split.ROWS)


def interleaved_qkv(architecture: Architecture) -> Layout:
    """One tensor as megatron-core has it: for each group its queries, its key and its value."""
    queries, keys = _heads(architecture)
    return _rows((queries + 2 * keys, architecture.hidden_size))


def attention_output(architecture: Architecture) -> Layout:
    """The projection after attention."""
    return _columns((architecture.hidden_size, architecture.num_heads * architecture.head_dim))


def gate_up(architecture: Architecture) -> Layout:
    """Two tensors: gate and up."""
    return _gate_up(architecture.ffn_hidden_size, architecture.hidden_size)


def fused_gate_up(architecture: Architecture) -> Layout:
    """One tensor: gate, then up."""
    size = architecture.ffn_hidden_size
    sections = (Section((Range(0, 0, size),)), Section((Range(0, size, 2 * size),)))
    return Layout(((2 * size, architecture.hidden_size),), sections, Split.ROWS)


def up(architecture: Architecture) -> Layout:
    """The first linear of an MLP without a gate."""
    return _rows((architecture.ffn_hidden_size, architecture.hidden_size))


def down(architecture: Architecture) -> Layout:
    """The last linear of an MLP."""
    return _columns((architecture.hidden_size, architecture.ffn_hidden_size))


def router(architecture: Architecture) -> Layout:
    """What chooses experts."""
    assert architecture.experts is not None
    return whole(architecture.experts.count, architecture.hidden_size)


def expert_gate_up(architecture: Architecture) -> Layout:
    """Gate and up of one expert."""
    assert architecture.experts is not None
    return _gate_up(architecture.experts.ffn_hidden_size, architecture.hidden_size)


def expert_down(architecture: Architecture) -> Layout:
    """The last linear of one expert."""
    assert architecture.experts is not None
    return _columns((architecture.hidden_size, architecture.experts.ffn_hidden_size))


def _heads(architecture: Architecture) -> tuple[int, int]:
    """Rows of all queries, and of all keys."""
    return architecture.num_heads * architecture.head_dim, architecture.num_kv_heads * architecture.head_dim


def _by_group(architecture: Architecture, *begins: tuple[int, int]) -> Section:
    """For each group its queries, its key and its value; `begins` says in which HF tensor each starts, and where."""
    head, groups = architecture.head_dim, architecture.num_kv_heads
    sizes = (architecture.num_heads // groups * head, head, head)
    return Section(
        tuple(
            Range(source, first + group * size, first + (group + 1) * size)
            for group in range(groups)
            for (source, first), size in zip(begins, sizes, strict=True)
        )
    )


def _rows(shape: tuple[int, ...]) -> Layout:
    return Layout((shape,), (Section((Range(0, 0, shape[0]),)),), Split.ROWS)


def _columns(shape: tuple[int, int]) -> Layout:
    return Layout((shape,), (Section((Range(0, 0, shape[1]),)),), Split.COLUMNS)


def _gate_up(size: int, width: int) -> Layout:
    shape = (size, width)
    return Layout((shape, shape), (Section((Range(0, 0, size),)), Section((Range(1, 0, size),))), Split.ROWS)
