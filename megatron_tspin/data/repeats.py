"""Which of many texts come more than once, found in sixteen bytes a text."""

from array import array

import numpy as np
from numpy.typing import NDArray

_BITS_64 = (1 << 64) - 1


class Repeats:
    """Texts with a number each; two different ones are taken for equal once in some 10^19 pairs."""

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._numbers = array("Q")

    def add(self, text: str, number: int) -> None:
        """Notes a text; numbers are not negative and rise."""
        self._hashes.append(hash(text) & _BITS_64)
        self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._hashes)

    def groups(self) -> list[list[int]]:
        """The numbers of each text that came more than once, ordered by the first one."""
        hashes = self._array()
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        same = np.concatenate([[False], ordered[1:] == ordered[:-1], [False]])
        starts = np.flatnonzero(same[1:] & ~same[:-1])
        ends = np.flatnonzero(~same[1:] & same[:-1]) + 1
        numbers = np.frombuffer(self._numbers, dtype=np.uint64)
        found = [numbers[order[start:end]].tolist() for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        return sorted(found)

    def shared(self, other: "Repeats") -> int:
        """How many of the texts are also texts of another collection."""
        return int(np.isin(self._array(), other._array()).sum())

    def _array(self) -> NDArray[np.uint64]:
        return np.frombuffer(self._hashes, dtype=np.uint64) if self._hashes else np.zeros(0, dtype=np.uint64)
