"""Whether a checkpoint's tensors are those that its config.json describes, from their names, shapes and types alone.

No torch here: the driver asks too.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families.registry import FAMILIES, tensors

FLOATING = ("F64", "F32", "F16", "BF16")
"""Types of weights that are read, as safetensors writes them."""


@dataclass(frozen=True)
class Header:
    """What a safetensors header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str


def tensor_problems(headers: Mapping[str, Header], architecture: Architecture) -> Iterator[str]:
    """Every tensor that is missing, left over, or of another shape or type.

    Buffers are not weights and are passed over. A tied checkpoint may store its embedding a second time as the head.
    """
    family = FAMILIES[architecture.family]
    left_over = set(weight_names(headers, architecture))
    for tensor in tensors(architecture):
        for name, shape in zip(tensor.hf, tensor.layout.shapes, strict=True):
            if name not in headers:
                yield f"tensor {name} is missing; config.json describes an architecture that has it"
                continue
            left_over.discard(name)
            if headers[name].shape != shape:
                yield f"tensor {name} has shape {list(headers[name].shape)}, config.json demands {list(shape)}"
            if headers[name].dtype not in FLOATING:
                yield refused_dtype(name, headers[name].dtype)
    if architecture.tied_embeddings:
        left_over.discard(family.head)
    for name in sorted(left_over):
        yield f"tensor {name} is left over; no part of the architecture in config.json takes it"


def weight_names(names: Iterable[str], architecture: Architecture) -> list[str]:
    """The names without those of buffers, which old checkpoints store beside the weights."""
    return [name for name in names if not name.endswith((".inv_freq", *FAMILIES[architecture.family].buffers))]


def refused_dtype(name: str, stored: str) -> str:
    """Why a tensor of this type is not read."""
    return f"tensor {name} has dtype {stored}; use an unquantised checkpoint in {', '.join(FLOATING)}"
