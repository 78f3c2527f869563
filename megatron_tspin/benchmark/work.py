"""How many floating-point operations a step takes on each side, predicted from the lengths alone.

What an operation is and what is left out: `objective.packing.work_model`. Backward multiplies twice as much as forward;
fused attention computes its scores again there, and so does our head with its logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_tspin.benchmark.lengths import response_tokens
from megatron_tspin.benchmark.settings import OWN_SIDES, PACKED, PADDED, RECIPE, StepSettings
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.objective.packing import Shape, work_model

_TRAINED = 3.0
_TRAINED_ATTENTION = 3.5
_TRAINED_TILED_HEAD = 4.0
_ROW_MULTIPLE = 8


@dataclass(frozen=True)
class Work:
    """What a side runs in one step.

    Attributes:
        tokens: Positions that go through the layers, padding included.
        pairs: Pairs of query and key that attention computes.
        head_positions: Positions whose logits are computed.
        head: Operations of the head's forward and backward, over those of its forward.
        attention: The same for attention.
        layers: The same for the linear layers.
    """

    tokens: int
    pairs: int
    head_positions: int
    head: float = _TRAINED
    attention: float = _TRAINED_ATTENTION
    layers: float = _TRAINED

    def flops(self, architecture: Architecture) -> float:
        """Floating-point operations of forward and backward."""
        work = work_model(architecture)
        return (
            self.layers * work.per_token * self.tokens
            + self.attention * work.per_pair * self.pairs
            + self.head * work.per_target * self.head_positions
        )


def predicted_flops(side: str, shapes: Sequence[Shape], architecture: Architecture, settings: StepSettings) -> float:
    """Floating-point operations that a side spends on the batch, what it wastes included.

    Args:
        side: One of `settings.SIDES`; any other does as plain transformers does.
        shapes: Lengths of the global batch, in order.
        architecture: Of the policy.
        settings: Micro-batch size.
    """
    if side == PADDED:
        return _padded(shapes, settings.micro_batch_size).flops(architecture)
    if side in OWN_SIDES:
        return _packed(shapes, share_prompts=side == PACKED).flops(architecture)
    work = _concatenated(shapes, settings.micro_batch_of(side))
    if side == RECIPE:  # layers run forward once more
        work = replace(work, layers=_TRAINED + 1, attention=_TRAINED_ATTENTION + 1)
    return work.flops(architecture)


def useful_flops(shapes: Sequence[Shape], architecture: Architecture) -> float:
    """The least that a step can do: no padding, a prompt once, logits of response tokens only, nothing twice."""
    least = _packed(shapes, share_prompts=True)
    return Work(least.tokens, least.pairs, least.head_positions, attention=_TRAINED).flops(architecture)


def _concatenated(shapes: Sequence[Shape], micro_batch_size: int) -> Work:
    """Rows padded to the longest of their micro-batch; logits of all positions.

    Attention gets a mask and computes all pairs; transformers leaves the mask out where no row is padded.
    """
    tokens = pairs = 0
    for start in range(0, len(shapes), micro_batch_size):
        together = shapes[start : start + micro_batch_size]
        rows = [shape.prompt + length for shape in together for length in shape.responses]
        longest = max(rows)
        tokens += len(rows) * longest
        pairs += len(rows) * (_causal(longest) if min(rows) == longest else longest**2)
    return Work(tokens, pairs, tokens)


def _padded(shapes: Sequence[Shape], micro_batch_size: int) -> Work:
    """Rows padded to the longest of the step, whose last token is only predicted; the last micro-batch is filled up."""
    rows = [shape.prompt + length - 1 for shape in shapes for length in shape.responses]
    longest = -(-max(rows) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    count = -(-len(shapes) // micro_batch_size) * micro_batch_size * len(shapes[0].responses)
    return _with_tiled_head(count * longest, count * _causal(longest), shapes)


def _packed(shapes: Sequence[Shape], share_prompts: bool) -> Work:
    """No padding but a few tokens at the end of a row, left out here; attention only where it is needed."""
    tokens = sum(shape.row_tokens(share_prompts) for shape in shapes)
    pairs = sum(shape.attention_pairs(share_prompts) for shape in shapes)
    return _with_tiled_head(tokens, pairs, shapes)


def _with_tiled_head(tokens: int, pairs: int, shapes: Sequence[Shape]) -> Work:
    return Work(tokens, pairs, response_tokens(shapes), head=_TRAINED_TILED_HEAD)


def _causal(length: int) -> int:
    """Pairs of a causal sequence."""
    return length * (length + 1) // 2
