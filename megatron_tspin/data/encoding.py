"""From examples to token ids, batch by batch, with a stated policy for what does not fit."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tspin.config import Config
from megatron_tspin.data.annotated import Example
from megatron_tspin.data.problems import Names, Problems
from megatron_tspin.data.template import PromptTemplate
from megatron_tspin.data.user_examples import Located
from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger, progress_bar

_BATCH = 1024
_BATCH_CHARACTERS = 4 * 2**20
_AHEAD = 2  # batches that wait for the tokenizer while others are read and written

Ids = tuple[list[list[int]], list[list[int]]]
"""Prompts and responses of some examples."""

logger = get_logger(__name__)


@dataclass
class EncodedExamples:
    """Examples with their ids; the three lists run in parallel."""

    examples: list[Example] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    responses: list[list[int]] = field(default_factory=list)
    """Annotated responses, closed unless they were truncated."""

    def first(self, count: int) -> "EncodedExamples":
        """The first `count` of them."""
        return EncodedExamples(self.examples[:count], self.prompts[:count], self.responses[:count])

    def add(self, example: Example, prompt: list[int], response: list[int]) -> None:
        """Appends one example."""
        self.examples.append(example)
        self.prompts.append(prompt)
        self.responses.append(response)

    def extend(self, other: "EncodedExamples") -> None:
        """Appends others."""
        self.examples += other.examples
        self.prompts += other.prompts
        self.responses += other.responses


class Encoder:
    """Encodes examples and applies `data.over_long`.

    Args:
        config: The run's config.
        template: Makes the ids.
        stop_ids: End a response.
    """

    def __init__(self, config: Config, template: PromptTemplate, stop_ids: frozenset[int]) -> None:
        self._seq_length = config.data.seq_length
        self._over_long = config.data.over_long
        self._max_new_tokens = config.generation.max_new_tokens
        self._template = template
        self._stop_ids = stop_ids

    def encode(self, source: Path, split: str, examples: Iterable[Located[Example]]) -> Iterator[EncodedExamples]:
        """Encodes the examples of a split, with a progress bar; a few batches are in memory at a time.

        While the tokenizer's threads are at work on one batch, the next one is read and the last one is written.

        Raises:
            InputError: After the last example: prompts are empty or leave no room for a response, or annotated
                responses do not fit and `over_long` is `refuse`; all of them in one message. Or nothing is left.
        """
        outcome = _Outcome(self._seq_length)
        with progress_bar(f"tokenize {split}", None, "example") as bar:
            for batch, (prompts, responses) in self._in_batches(examples):
                encoded = EncodedExamples()
                for located, prompt, response in zip(batch, prompts, responses, strict=True):
                    self._admit(outcome, encoded, located, prompt, response)
                bar.update(len(batch))
                outcome.total += len(batch)
                outcome.kept += len(encoded.examples)
                if encoded.examples:
                    yield encoded
        outcome.raise_if_refused()
        self._report(split, outcome)
        if not outcome.kept:
            raise InputError(f"{source}: no example fits into --seq-length {self._seq_length}; raise it")

    def _in_batches(self, examples: Iterable[Located[Example]]) -> Iterator[tuple[list[Located[Example]], Ids]]:
        waiting: deque[tuple[list[Located[Example]], Future[Ids]]] = deque()
        with ThreadPoolExecutor(1, "tokenize") as worker:
            for batch in _batches(examples):
                waiting.append((batch, worker.submit(self._template.encode, [located.item for located in batch])))
                if len(waiting) > _AHEAD:
                    ready, ids = waiting.popleft()
                    yield ready, ids.result()
            for ready, ids in waiting:
                yield ready, ids.result()

    def _admit(
        self,
        outcome: "_Outcome",
        encoded: EncodedExamples,
        located: Located[Example],
        prompt: list[int],
        response: list[int],
    ) -> None:
        example = located.item
        if not prompt:
            outcome.refuse(located, "the prompt has no tokens under this template", 0)
            return
        if len(prompt) + self._max_new_tokens > self._seq_length:
            reason = f"the prompt has {len(prompt)} tokens, with --tspin-max-new-tokens {self._max_new_tokens}"
            outcome.refuse(located, reason, len(prompt) + self._max_new_tokens)
            return
        room = self._seq_length - len(prompt)
        if len(response) > room:
            outcome.unfit.add(example.id)
            if self._over_long == "refuse":
                reason = f"prompt and annotated response have {len(prompt)} + {len(response)} tokens"
                outcome.refuse(located, reason, len(prompt) + len(response))
            if self._over_long != "truncate":
                return
        for text in self._template.special_texts_in(example):
            outcome.special.setdefault(text, Names()).add(example.id)
        if not self._stop_ids.isdisjoint(response[:-1]):
            outcome.inner_stops.add(example.id)
        encoded.add(example, prompt, response[:room])

    def _report(self, split: str, outcome: "_Outcome") -> None:
        if outcome.unfit.count:
            done = "dropped" if self._over_long == "drop" else "truncated the responses of"
            count = f"{outcome.unfit.count} of {outcome.total}"
            logger.warning("%s: %s %s examples over %d tokens: %s", split, done, count, self._seq_length, outcome.unfit)
        for text, ids in outcome.special.items():
            logger.warning(
                "%s: %d of %d examples hold the text of the special token %r, which becomes that token: %s",
                split,
                ids.count,
                outcome.total,
                text,
                ids,
            )
        if outcome.inner_stops.count:
            logger.warning(
                "%s: %d of %d annotated responses hold a token that ends responses before their end: %s",
                split,
                outcome.inner_stops.count,
                outcome.total,
                outcome.inner_stops,
            )


def _batches(examples: Iterable[Located[Example]]) -> Iterator[list[Located[Example]]]:
    """The examples in lists, each short enough for its texts to be in memory."""
    batch: list[Located[Example]] = []
    characters = 0
    for located in examples:
        batch.append(located)
        characters += len(located.item.prompt) + len(located.item.response)
        if len(batch) == _BATCH or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Outcome:
    """What became of the examples of one source."""

    def __init__(self, seq_length: int) -> None:
        self.total = 0
        self.kept = 0
        self.unfit = Names()
        """Ids of examples whose annotated response is too long."""
        self.inner_stops = Names()
        self.special: dict[str, Names] = {}
        """Ids of the examples whose own texts hold a special token, by its text."""
        self._seq_length = seq_length
        self._refused = Problems()
        self._needed = 0

    def refuse(self, located: Located[Example], reason: str, needed: int) -> None:
        """Notes an example that would need a sequence length of `needed`, or 0 if none would help."""
        limit = f", more than --seq-length {self._seq_length}" if needed else ""
        self._refused.add(f"{located.place}: id {located.item.id!r}: {reason}{limit}")
        self._needed = max(self._needed, needed)

    def raise_if_refused(self) -> None:
        """Raises an InputError with the place of all refused examples."""
        remedy = "change --template or remove these examples"
        if self._needed:
            remedy = (
                f"raise --seq-length to {self._needed} (if the model allows it) or remove these examples; "
                "for annotated responses --over-long can also drop the example or truncate the response"
            )
        self._refused.raise_if_any(remedy)
