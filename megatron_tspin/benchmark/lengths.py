"""Lengths and token ids of the triplets that a benchmark runs.

Lengths are log-normal. What is known of UltraChat-200k, which the paper trains on:

* Its SFT split has 207 865 dialogues of 1 397 058 554 bytes (README.md of
  huggingface.co/datasets/HuggingFaceH4/ultrachat_200k); without the columns `prompt` and `prompt_id` they are
  1 203 127 976 bytes (README.md of huggingface.co/datasets/mlabonne/ultrachat_200k_sft). The difference less an id of
  64 characters and 8 bytes of offsets is 861 bytes: the mean length of a first prompt.
* Training on those dialogues once took 5608.3 s at 24.861 samples a second (train_results.json of
  huggingface.co/alignment-handbook/zephyr-7b-sft-full, commit 8104d49). Read as packed rows of 2048 tokens, these
  139 428 samples are 1374 tokens a dialogue under Mistral's tokenizer and the chat template: 4.2 bytes a token.
* Dialogues were made with 3 to 7 turns (README.md of github.com/thunlp/UltraChat).

So a first prompt has some 205 tokens on average, and some 215 with the paper's template. No figures were found for the
rest, which is ASSUMED: three to four turns a dialogue after filtering and later prompts of some 25 tokens, which leaves
responses of some 340 tokens on average; the spreads (sigma 1.4 for prompts, most of which are a question and some a
whole article; 0.6 for responses); sampled responses as long as annotated ones; and a correlation of 0.5 between the
log-lengths of a triplet's responses, which wastes a little less padding than independent lengths would.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tspin.objective.packing import Shape
from megatron_tspin.objective.roles import ROLES

_RESPONSE_CORRELATION = 0.5


@dataclass(frozen=True)
class LogNormal:
    """A log-normal number of tokens.

    Attributes:
        mean: Of the tokens, not of their logarithm.
        sigma: Standard deviation of the logarithm; 0 makes every length the mean.
    """

    mean: float
    sigma: float

    def at(self, score: float) -> int:
        """The length at a standard normal score, at least 1."""
        return max(1, round(self.mean * math.exp(self.sigma * score - self.sigma**2 / 2)))


@dataclass(frozen=True)
class Distribution:
    """How long prompts and responses are."""

    prompt: LogNormal
    response: LogNormal


DISTRIBUTIONS = {
    "ultrachat": Distribution(LogNormal(215, 1.4), LogNormal(340, 0.6)),
    "short_prompt": Distribution(LogNormal(40, 0.5), LogNormal(340, 0.6)),
    "long_prompt": Distribution(LogNormal(1000, 0.5), LogNormal(150, 0.6)),
    "all_equal": Distribution(LogNormal(9, 0.0), LogNormal(248, 0.0)),
}
"""`all_equal` leaves nothing to gain: no padding to save, and next to no prompt to share."""


@dataclass(frozen=True)
class TokenTriplet:
    """Token ids of a prompt and of its responses in the order of `ROLES`."""

    prompt: list[int]
    responses: tuple[list[int], ...]


def draw_lengths(name: str, count: int, max_length: int, seed: int) -> list[Shape]:
    """Draws the lengths of a global batch; the same arguments give the same lengths.

    A prompt is cut to half of `max_length`, as SPIN's public code does (512 of 1024), a response to what is left.

    Args:
        name: One of `DISTRIBUTIONS`.
        count: Triplets.
        max_length: Most tokens of a prompt and a response together, 4 or more.
        seed: Of the draw.
    """
    chance, shape = random.Random(f"lengths/{name}/{seed}"), DISTRIBUTIONS[name]
    drawn = []
    for _ in range(count):
        prompt = min(shape.prompt.at(chance.gauss(0, 1)), max_length // 2)
        common = chance.gauss(0, 1)
        scores = [
            math.sqrt(_RESPONSE_CORRELATION) * common + math.sqrt(1 - _RESPONSE_CORRELATION) * chance.gauss(0, 1)
            for _ in ROLES
        ]
        drawn.append(Shape(prompt, tuple(min(shape.response.at(score), max_length - prompt) for score in scores)))
    return drawn


def draw_tokens(lengths: Sequence[Shape], vocab_size: int, seed: int) -> list[TokenTriplet]:
    """Draws token ids, uniform over the vocabulary but for its first ids, which are often special."""
    chance = random.Random(f"tokens/{seed}")
    first = min(3, vocab_size - 1)

    def ids(count: int) -> list[int]:
        return [chance.randrange(first, vocab_size) for _ in range(count)]

    return [TokenTriplet(ids(item.prompt), tuple(ids(length) for length in item.responses)) for item in lengths]


def response_tokens(lengths: Sequence[Shape]) -> int:
    """Tokens of all responses."""
    return sum(sum(item.responses) for item in lengths)
