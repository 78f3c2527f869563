"""Which examples are for training and which are held out."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tspin.config import DataSection
from megatron_tspin.data.annotated import Example
from megatron_tspin.data.turns import opening
from megatron_tspin.data.user_examples import Located, iterate_annotated
from megatron_tspin.errors import InputError
from megatron_tspin.run_folder import HELD_OUT, TRAIN

_DIGEST_BYTES = 8


@dataclass(frozen=True)
class Split:
    """The examples of one split, to be read any number of times."""

    name: str
    source: Path
    _data: DataSection
    _keep: Callable[[Example], bool]

    def __call__(self, quiet: bool = False) -> Iterator[Located[Example]]:
        """Reads them; see `user_examples.iterate_annotated`.

        Raises:
            InputError: As there, or `data.held_out_fraction` leaves none.
        """
        located = None
        for located in iterate_annotated(self.source, self._data, self._keep, quiet):
            yield located
        if located is None:
            raise InputError(
                f"{self.source}: data.held_out_fraction = {self._data.held_out_fraction} leaves no example for "
                f"{self.name}; change it, or name a file with --held-out"
            )


def splits_of(data: DataSection) -> dict[str, Split]:
    """The splits of a run by name, training first."""
    source = Path(data.annotated)
    if data.held_out_fraction > 0:
        return {
            TRAIN: Split(TRAIN, source, data, lambda example: not is_held_out(example, data)),
            HELD_OUT: Split(HELD_OUT, source, data, lambda example: is_held_out(example, data)),
        }
    found = {TRAIN: Split(TRAIN, source, data, _all)}
    if data.held_out is not None:
        found[HELD_OUT] = held_out_file(Path(data.held_out), data)
    return found


def held_out_file(source: Path, data: DataSection) -> Split:
    """Held-out examples in a file of their own."""
    return Split(HELD_OUT, source, data, _all)


def is_held_out(example: Example, data: DataSection) -> bool:
    """Whether a hash of what its conversation begins with, keyed by `data.split_seed`, is among the lowest ones.

    So it depends on nothing else: not on other examples, their order, or ids. Examples with the same prompt, and all
    turns of a conversation, are on the same side.
    """
    text = " ".join((opening(example.messages) if example.messages else example.prompt).split())
    key = str(data.split_seed).encode("ascii")
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=_DIGEST_BYTES, key=key).digest()
    return int.from_bytes(digest, "big") < int(data.held_out_fraction * (1 << 8 * _DIGEST_BYTES))


def _all(example: Example) -> bool:
    return True
