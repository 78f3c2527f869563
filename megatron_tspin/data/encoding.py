"""From examples to token ids, with a stated policy for what does not fit."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tspin.config import Config
from megatron_tspin.data.annotated import Example
from megatron_tspin.data.problems import Problems, listed
from megatron_tspin.data.template import PromptTemplate
from megatron_tspin.data.user_examples import line_numbers
from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger, progress_bar

_BATCH = 1024

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


class Encoder:
    """Encodes examples and applies `data.over_long`.

    Args:
        config: The run's config.
        template: Makes the ids.
        stop_ids: End a response.
    """

    def __init__(self, config: Config, template: PromptTemplate, stop_ids: Collection[int]) -> None:
        self._seq_length = config.data.seq_length
        self._over_long = config.data.over_long
        self._max_new_tokens = config.generation.max_new_tokens
        self._template = template
        self._stop_ids = stop_ids

    def encode(self, source: Path, split: str, examples: Sequence[Example]) -> EncodedExamples:
        """Encodes all examples of a split, with a progress bar.

        Raises:
            InputError: Prompts are empty or leave no room for a response, or annotated responses do not fit and
                `over_long` is `refuse`; all of them in one message. Or nothing is left.
        """
        outcome = _Outcome(source, self._seq_length)
        with progress_bar(f"tokenize {split}", len(examples), "example") as bar:
            for start in range(0, len(examples), _BATCH):
                batch = examples[start : start + _BATCH]
                for index, ids in enumerate(zip(*self._template.encode(batch), strict=True), start):
                    self._admit(outcome, index, examples[index], *ids)
                bar.update(len(batch))
        outcome.raise_if_refused()
        self._report(split, outcome, len(examples))
        if not outcome.encoded.examples:
            raise InputError(f"{source}: no example fits into --seq-length {self._seq_length}; raise it")
        return outcome.encoded

    def _admit(self, outcome: "_Outcome", index: int, example: Example, prompt: list[int], response: list[int]) -> None:
        if not prompt:
            outcome.refuse(index, example, "the prompt has no tokens under this template", 0)
            return
        if len(prompt) + self._max_new_tokens > self._seq_length:
            reason = f"the prompt has {len(prompt)} tokens, with --tspin-max-new-tokens {self._max_new_tokens}"
            outcome.refuse(index, example, reason, len(prompt) + self._max_new_tokens)
            return
        room = self._seq_length - len(prompt)
        if len(response) > room:
            outcome.unfit.append(example.id)
            if self._over_long == "refuse":
                reason = f"prompt and annotated response have {len(prompt)} + {len(response)} tokens"
                outcome.refuse(index, example, reason, len(prompt) + len(response))
            if self._over_long != "truncate":
                return
        for text in self._template.special_texts_in(example):
            outcome.special.setdefault(text, []).append(example.id)
        if any(token in self._stop_ids for token in response[:-1]):
            outcome.inner_stops.append(example.id)
        outcome.encoded.add(example, prompt, response[:room])

    def _report(self, split: str, outcome: "_Outcome", total: int) -> None:
        if outcome.unfit:
            done = "dropped" if self._over_long == "drop" else "truncated the responses of"
            count = f"{len(outcome.unfit)} of {total}"
            logger.warning(
                "%s: %s %s examples over %d tokens: %s", split, done, count, self._seq_length, listed(outcome.unfit)
            )
        for text, ids in outcome.special.items():
            logger.warning(
                "%s: %d of %d examples hold the text of the special token %r, which becomes that token: %s",
                split,
                len(ids),
                total,
                text,
                listed(ids),
            )
        if outcome.inner_stops:
            logger.warning(
                "%s: %d of %d annotated responses hold a token that ends responses before their end: %s",
                split,
                len(outcome.inner_stops),
                total,
                listed(outcome.inner_stops),
            )


class _Outcome:
    """What became of the examples of one source."""

    def __init__(self, source: Path, seq_length: int) -> None:
        self.encoded = EncodedExamples()
        self.unfit: list[str] = []
        """Ids of examples whose annotated response is too long."""
        self.inner_stops: list[str] = []
        self.special: dict[str, list[str]] = {}
        """Ids of the examples whose own texts hold a special token, by its text."""
        self._source = source
        self._seq_length = seq_length
        self._refused: list[tuple[int, str]] = []
        self._needed = 0

    def refuse(self, index: int, example: Example, reason: str, needed: int) -> None:
        """Notes an example that would need a sequence length of `needed`, or 0 if none would help."""
        limit = f", more than --seq-length {self._seq_length}" if needed else ""
        self._refused.append((index, f"id {example.id!r}: {reason}{limit}"))
        self._needed = max(self._needed, needed)

    def raise_if_refused(self) -> None:
        """Raises an InputError with file and line of all refused examples."""
        if not self._refused:
            return
        lines = line_numbers(self._source)
        problems = Problems()
        for index, reason in self._refused:
            problems.add(f"{self._source}:{lines[index]}: {reason}")
        remedy = "change --template or remove these examples"
        if self._needed:
            remedy = (
                f"raise --seq-length to {self._needed} (if the model allows it) or remove these examples; "
                "for annotated responses --over-long can also drop the example or truncate the response"
            )
        problems.raise_if_any(remedy)
