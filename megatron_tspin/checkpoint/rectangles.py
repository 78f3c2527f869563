"""A range of a flattened tensor as rectangles of the tensor. No torch here."""

import math
from collections.abc import Iterator, Sequence

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and shape, a number a dimension."""


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[Rectangle]:
    """Cuts the range `start:stop` of a flattened tensor into rectangles of the tensor, in the range's order."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    width = math.prod(shape[1:])
    first, last = -(-start // width), stop // width  # the whole rows
    if first > last:  # inside one row
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * width)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, last * width, stop)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Rectangle]:
    before = row * math.prod(shape[1:])
    for offset, size in rectangles(shape[1:], start - before, stop - before):
        yield (row, *offset), (1, *size)
