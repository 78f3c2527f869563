"""Plans the rows of a global batch from the lengths of its triplets, before any tensor exists.

Whole triplets go into rows of a fixed capacity, so that rows cost about the same: work is counted in floating-point
operations of the linear layers, of attention and of the head, not in tokens alone. Everything is deterministic.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tspin.config import Config
from megatron_tspin.errors import InputError
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.sizes import attention_flops, head_flops, layer_flops

_SHOWN = 20
_BACKWARD = 2
"""Backward multiplies twice as much as forward."""
_HEAD_RECOMPUTED = 1
"""The head computes its logits again in backward."""


@dataclass(frozen=True)
class Shape:
    """Lengths of a triplet in tokens: the prompt and the responses that are computed.

    The last token of a response is only ever predicted, so a response takes one place less in a row.
    """

    prompt: int
    responses: tuple[int, ...]

    def bundles(self, share_prompts: bool) -> list["Shape"]:
        """Itself, or one prompt a response where prompts are not shared."""
        return [self] if share_prompts else [Shape(self.prompt, (response,)) for response in self.responses]

    def row_tokens(self, share_prompts: bool) -> int:
        """Places that the triplet takes in a packed row."""
        return sum(
            bundle.prompt + sum(response - 1 for response in bundle.responses) for bundle in self.bundles(share_prompts)
        )

    def attention_pairs(self, share_prompts: bool) -> int:
        """Number of (query, key) pairs that see each other."""
        pairs = 0
        for bundle in self.bundles(share_prompts):
            pairs += _triangle(bundle.prompt)
            pairs += sum(_triangle(response - 1) + (response - 1) * bundle.prompt for response in bundle.responses)
        return pairs


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


@dataclass(frozen=True)
class WorkModel:
    """Floating-point operations of a forward pass; a multiplication and its addition count as two.

    Attributes:
        per_token: Linear layers, of one token.
        per_pair: Attention scores and their use, of one query and one key.
        per_target: The head, of one response token.
    """

    per_token: float
    per_pair: float
    per_target: float

    def training(self, shape: Shape, share_prompts: bool) -> float:
        """Operations of forward and backward over a triplet. Attention's backward computes its scores again."""
        layers = (1 + _BACKWARD) * self.per_token * shape.row_tokens(share_prompts)
        attention = (1 + _BACKWARD + 0.5) * self.per_pair * shape.attention_pairs(share_prompts)
        head = (1 + _BACKWARD + _HEAD_RECOMPUTED) * self.per_target * sum(shape.responses)
        return layers + attention + head


def work_model(architecture: Architecture) -> WorkModel:
    """Counts the operations of an architecture; norms, rotary angles and activation functions are left out."""
    return WorkModel(
        per_token=layer_flops(architecture),
        per_pair=attention_flops(architecture),
        per_target=head_flops(architecture),
    )


@dataclass(frozen=True)
class Packing:
    """How rows are made.

    Attributes:
        capacity: Most tokens of a row.
        multiple: Row lengths are multiples of this.
        share_prompts: One prompt a triplet, or one a response.
        uniform: All rows of a global batch are equally long, see `ParallelSection.equal_rows`.
        row_count_multiple: The rows of a replica are a multiple of this, as virtual pipeline stages need.
    """

    capacity: int
    multiple: int
    share_prompts: bool = True
    uniform: bool = False
    row_count_multiple: int = 1


def row_packing(config: Config) -> Packing | None:
    """The configured way to pack; None where rows are padded."""
    training, multiple = config.training, config.row_length_multiple
    if training.layout == "padded":
        return None
    return Packing(
        capacity=max(config.row_capacity // multiple, 1) * multiple,
        multiple=multiple,
        share_prompts=training.share_prompts,
        uniform=config.parallel.equal_rows,
        row_count_multiple=config.parallel.row_count_multiple,
    )


@dataclass(frozen=True)
class PlannedRow:
    """A row: which triplets (indices into the global batch, ascending) and its length in tokens, padding included."""

    members: tuple[int, ...]
    length: int


def plan_rows(shapes: Sequence[Shape], packing: Packing, work: WorkModel, replicas: int = 1) -> list[list[PlannedRow]]:
    """Places whole triplets into rows; every replica gets the same number of rows, of about the same work.

    Longest-processing-time first: triplets by falling work, each into the lightest row that has room. Rows are as
    few as the capacity allows; where placing fails, one more row a replica is tried.

    Args:
        shapes: Triplets of the global batch, in order.
        packing: How rows are made.
        work: Prices a triplet.
        replicas: DP size.

    Returns:
        The rows of each replica; a row may be empty where there are fewer triplets than rows.

    Raises:
        InputError: A triplet does not fit into any row; `check_capacity` names it.
    """
    sizes = [shape.row_tokens(packing.share_prompts) for shape in shapes]
    if sizes and max(sizes) > packing.capacity:
        raise InputError(f"a triplet of {max(sizes)} tokens does not fit into rows of {packing.capacity}")
    costs = [work.training(shape, packing.share_prompts) for shape in shapes]
    order = sorted(range(len(shapes)), key=lambda i: (-costs[i], i))
    count = -(-max(sum(sizes), 1) // packing.capacity)
    rounds = _cover(-(-count // replicas), packing.row_count_multiple)
    while (bins := _place(order, sizes, costs, packing.capacity, rounds * replicas)) is None:
        rounds += packing.row_count_multiple
    return _share_out(bins, sizes, costs, packing, replicas)


def _place(
    order: Sequence[int], sizes: Sequence[int], costs: Sequence[float], capacity: int, count: int
) -> list[list[int]] | None:
    """Members of each of `count` rows, or None where a triplet finds no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    room, load = [capacity] * count, [0.0] * count
    for item in order:
        fitting = [i for i in range(count) if room[i] >= sizes[item]]
        if not fitting:
            return None
        lightest = min(fitting, key=lambda i: (load[i], i))
        bins[lightest].append(item)
        room[lightest] -= sizes[item]
        load[lightest] += costs[item]
    return bins


def _share_out(
    bins: list[list[int]], sizes: Sequence[int], costs: Sequence[float], packing: Packing, replicas: int
) -> list[list[PlannedRow]]:
    """Gives each replica a row of every `replicas` alike ones, in changing order, so that their sums are alike too."""
    lengths = {id(members): _cover(sum(sizes[i] for i in members), packing.multiple) for members in bins}
    longest = max(lengths.values())
    ordered = sorted(bins, key=lambda members: (-sum(costs[i] for i in members), members))
    shares: list[list[PlannedRow]] = [[] for _ in range(replicas)]
    for start in range(0, len(ordered), replicas):
        alike = ordered[start : start + replicas]
        if (start // replicas) % 2:
            alike = alike[::-1]
        for share, members in zip(shares, alike, strict=True):
            share.append(PlannedRow(tuple(sorted(members)), longest if packing.uniform else lengths[id(members)]))
    return shares


def _cover(size: int, multiple: int) -> int:
    """The smallest positive multiple that is not below the size."""
    return max(-(-size // multiple), 1) * multiple


def check_capacity(shapes: Sequence[Shape], ids: Sequence[str], packing: Packing) -> None:
    """Refuses triplets that are longer than a row.

    Raises:
        InputError: Names each such prompt (at most 20) with its tokens.
    """
    sizes = [
        (shape.row_tokens(packing.share_prompts), identifier) for shape, identifier in zip(shapes, ids, strict=True)
    ]
    long = [(size, identifier) for size, identifier in sizes if size > packing.capacity]
    if not long:
        return
    needed = _cover(max(size for size, _ in long), packing.multiple)
    lines = [f"prompt {identifier}: its triplet has {size} tokens" for size, identifier in long[:_SHOWN]]
    if len(long) > _SHOWN:
        lines.append(f"and {len(long) - _SHOWN} more")
    raise InputError(
        f"training.row_capacity = {packing.capacity} tokens is too small for {len(long)} of {len(shapes)} triplets; "
        f"set --tspin-row-capacity to {needed} or more, or --tspin-over-capacity truncate\n" + "\n".join(lines)
    )


def truncated(shape: Shape, packing: Packing, identifier: str) -> Shape:
    """The triplet with its longest responses cut, all to the same length, so that it fits into a row.

    Args:
        shape: The triplet.
        packing: The row.
        identifier: Id of the prompt, for the error.

    Raises:
        InputError: The prompt alone leaves no room for one token of each response.
    """
    if shape.row_tokens(packing.share_prompts) <= packing.capacity:
        return shape
    prompts = shape.prompt * (1 if packing.share_prompts else len(shape.responses))
    room = packing.capacity - prompts + len(shape.responses)
    if room < len(shape.responses):
        raise InputError(
            f"training.row_capacity = {packing.capacity} tokens does not hold prompt {identifier} of {shape.prompt} "
            "tokens; raise --tspin-row-capacity"
        )
    kept = dict(enumerate(shape.responses))
    lengths = [0] * len(shape.responses)
    while kept:  # shortest first: what a short response does not use, longer ones get
        index = min(kept, key=lambda i: (kept[i], i))
        lengths[index] = min(kept.pop(index), room // (len(kept) + 1))
        room -= lengths[index]
    return Shape(shape.prompt, tuple(lengths))
