"""Which tensors of two checkpoints differ, and by how much; one tensor of each in memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_tspin.checkpoint.any_folder import AsHF, Weights
from megatron_tspin.checkpoint.core_folder import CoreFolder
from megatron_tspin.checkpoint.hf_folder import HFFolder
from megatron_tspin.checkpoint.tensor_check import Header
from megatron_tspin.log import track
from megatron_tspin.models.hf_config import read_architecture

_ELEMENTS_AT_ONCE = 2**20


@dataclass(frozen=True)
class TensorDifference:
    """What two checkpoints have under one name.

    Attributes:
        name: Of the tensor.
        first: In the first checkpoint; None if it is not there.
        second: In the second one.
        max_abs: Largest absolute difference of two values; None if they cannot be compared.
        relative: Norm of the difference over the norm of the first.
    """

    name: str
    first: Header | None
    second: Header | None
    max_abs: float | None = None
    relative: float | None = None

    @property
    def differs(self) -> bool:
        """Whether anything does, its type included."""
        return self.first != self.second or self.max_abs != 0


def comparable(first: CoreFolder | HFFolder, second: CoreFolder | HFFolder) -> tuple[Weights, Weights]:
    """Both under the same names: where one is of each kind, under those of the HF folder.

    Raises:
        InputError: The HF folder's config.json is refused, or is of another architecture.
    """
    if isinstance(first, CoreFolder) and isinstance(second, HFFolder):
        return AsHF(first, read_architecture(second.folder)), second
    if isinstance(first, HFFolder) and isinstance(second, CoreFolder):
        return first, AsHF(second, read_architecture(first.folder))
    return first, second


def compare(first: Weights, second: Weights) -> Iterator[TensorDifference]:
    """Every tensor of either, in the first one's order; then those that only the second one has.

    Raises:
        InputError: A tensor cannot be read.
    """
    names = [*first.headers, *(name for name in second.headers if name not in first.headers)]
    for name in track(names, "compare", len(names), "tensor"):
        one, two = first.headers.get(name), second.headers.get(name)
        if one is None or two is None or one.shape != two.shape:
            yield TensorDifference(name, one, two)
        else:
            yield TensorDifference(name, one, two, *_distance(first.read(name), second.read(name)))


def _distance(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """Largest absolute difference, and its norm over that of the first; in float64, a piece at a time."""
    largest = squares = norm = 0.0
    one, two = first.reshape(-1), second.reshape(-1)
    for begin in range(0, one.numel(), _ELEMENTS_AT_ONCE):
        value = one[begin : begin + _ELEMENTS_AT_ONCE].double()
        apart = two[begin : begin + _ELEMENTS_AT_ONCE].double() - value
        piece = float(apart.abs().max())
        largest = piece if math.isnan(piece) else max(largest, piece)
        squares += float(apart.square().sum())
        norm += float(value.square().sum())
    if squares == 0:
        return largest, 0.0
    return largest, math.sqrt(squares / norm) if norm else math.inf
