"""How large a network is and what it computes, counted from its table of tensors. No torch here."""

import math
from collections.abc import Iterator

from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families.registry import tensors
from megatron_tspin.models.families.table import Tensor


def num_parameters(architecture: Architecture) -> int:
    """Parameters of the whole network; tied embeddings count once."""
    return sum(map(_elements, tensors(architecture)))


def num_expert_parameters(architecture: Architecture) -> int:
    """Those among them that expert parallelism shares out."""
    return sum(_elements(tensor) for tensor in tensors(architecture) if tensor.expert is not None)


def parameters_per_layer(architecture: Architecture) -> list[int]:
    """Parameters of each layer, all its experts included."""
    found = [0] * architecture.num_layers
    for tensor in tensors(architecture):
        if tensor.layer is not None:
            found[tensor.layer] += _elements(tensor)
    return found


def layer_flops(architecture: Architecture) -> float:
    """Floating-point operations of all layers' linears for one token, forward; of experts those that a token takes.

    A multiplication and its addition count as two.
    """
    return 2.0 * sum(_used(architecture))


def attention_flops(architecture: Architecture) -> float:
    """The same of scores and their use, for one query and one key in all layers."""
    return 4.0 * architecture.num_layers * architecture.num_heads * architecture.head_dim


def head_flops(architecture: Architecture) -> float:
    """The same of the head, for one position."""
    return 2.0 * architecture.hidden_size * architecture.vocab_size


def _used(architecture: Architecture) -> Iterator[float]:
    """Elements of the matrices that a token meets in the layers."""
    experts = architecture.experts
    for tensor in tensors(architecture):
        if tensor.layer is None or len(tensor.layout.shapes[0]) < 2:
            continue
        if tensor.expert is None:
            yield _elements(tensor)
        elif experts is not None:
            yield _elements(tensor) * experts.per_token / experts.count


def _elements(tensor: Tensor) -> int:
    return sum(math.prod(shape) for shape in tensor.layout.shapes)
