"""Prompts that come more than once, within a split and across splits."""

from collections.abc import Iterable, Iterator

from megatron_tspin.data.annotated import Example
from megatron_tspin.data.problems import listed
from megatron_tspin.data.repeats import Repeats
from megatron_tspin.data.splits import Split
from megatron_tspin.data.user_examples import Located
from megatron_tspin.log import get_logger

_MOST_LINES = 6
_BETWEEN = "\0"  # so that no two pairs of prompt and response give the same text

logger = get_logger(__name__)


class SeenPrompts:
    """The prompts of a split, watched as they go by; takes 32 bytes an example.

    Args:
        split: Names the source in warnings.
    """

    def __init__(self, split: Split) -> None:
        self._split = split
        self._prompts = Repeats()
        self._pairs = Repeats()

    def watch(self, examples: Iterable[Located[Example]]) -> Iterator[Located[Example]]:
        """Yields the examples as they are."""
        for located in examples:
            example = located.item
            self._prompts.add(example.prompt, located.row)
            self._pairs.add(f"{example.prompt}{_BETWEEN}{example.response}", located.row)
            yield located

    def warn_of_repeats(self) -> None:
        """Says which lines have the same prompt: they weigh more in training, and their answers share it."""
        groups = self._prompts.groups()
        if not groups:
            return
        alike = sum(len(group) for group in self._pairs.groups())
        logger.warning(
            "%s: %d prompts of %s come more than once, in %d of %d examples, %d of which share the response too; "
            "the lines are %s",
            self._split.name,
            len(groups),
            self._split.source,
            sum(map(len, groups)),
            len(self._prompts),
            alike,
            listed([_lines(group) for group in groups]),
        )

    def warn_of_overlap(self, train: "SeenPrompts") -> None:
        """Says how many held-out prompts are training prompts too."""
        shared = self._prompts.shared(train._prompts)
        if shared:
            logger.warning("%d held-out prompts are also training prompts; their evaluation is not held out", shared)


def _lines(group: list[int]) -> str:
    shown = " = ".join(map(str, group[:_MOST_LINES]))
    return f"{shown} = ..." if len(group) > _MOST_LINES else shown
