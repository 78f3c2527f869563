"""Lines of the JSONL files that stages hand to each other, one schema each."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_tspin.errors import ArtifactError, InputError


class Record(BaseModel):
    """One line: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def line(self) -> str:
        """The record as one JSON line, newline included."""
        return self.model_dump_json() + "\n"


class Response(Record):
    """A response as it was sampled: its ids are stored and scored as they are, never re-tokenized."""

    id: str
    """Id of the prompt."""
    response_ids: list[int]
    """Sampled token ids; the token that ended it is there if and only if it was sampled."""
    token_log_probs: list[float]
    """log pi of each id under the policy at temperature 1, whatever the sampling settings were."""
    ended: bool
    """Whether a token that ends responses was sampled before the limit on new tokens."""
    ended_by: int | None = None
    """The id of that token."""
    text: str
    """The ids decoded, special tokens left out; for people and scorers."""
    sample: int = 0
    """Number of the response among those to the same prompt; not in the line if it is 0."""

    def line(self) -> str:
        """The record as one JSON line, newline included."""
        return self.model_dump_json(exclude=None if self.sample else {"sample"}) + "\n"


class ScoredResponse(Record):
    """A sequence log-prob that `tspin score` wrote."""

    id: str
    log_prob: float
    """Sum of the token log-probs over the response, closing EOS included."""
    num_tokens: int


class ReferenceLogProbs(Record):
    """log pi_t of the responses to one prompt, computed once per iteration."""

    id: str
    log_probs: dict[str, float]
    """Sequence log-prob by role."""


class Differences(Record):
    """How far two computations of the same quantities lie apart, in nats."""

    count: int
    mean: float
    """The bias."""
    standard_deviation: float
    mean_absolute: float
    p95_absolute: float
    """95 of 100 are no larger than this."""
    largest_absolute: float
    largest_id: str
    """Id of the prompt where it is."""
    per_token_rms: float
    """Root of the squared differences' sum over the tokens' sum: the error of one token, were errors independent."""


class MarginNoise(Record):
    """What low precision does to a scaled difference of two log-probs, a value a prompt whose responses differ."""

    noise: Differences
    median_absolute: float
    """Median size of the margin itself, in fp32."""
    noise_share: float | None
    """The noise's mean absolute over that median; None where the median is 0."""


class PrecisionNoise(Record):
    """What the number formats of training do to log-probs: a sample of prompts, at the start of an iteration."""

    iteration: int
    """Self-play iteration."""
    precision: str
    """The number formats, in words."""
    num_prompts: int
    num_responses: int
    mean_tokens: float
    """Mean response length."""
    log_prob: Differences
    """Under the training precision minus in fp32, of every response that the loss computes."""
    current_margin: MarginNoise | None
    """Of alpha (log pi(y) - log pi(y')), or of lambda times it (spin); None for sft, or if every y' is its y."""
    historical_margin: MarginNoise | None
    """Of alpha (log pi(y') - log pi(y0)), where y0 is computed."""
    without_reference: bool
    """Whether the method subtracts reference log-probs, which these margins leave out: with them they are still 0."""
    drift: Differences | None
    """Of y': as the training precision scores it minus as the generation engine did when it sampled it."""
    drift_share: float | None
    """The drift's mean absolute, scaled as the margin, over the median current margin."""
    no_drift: str | None
    """Why the drift was not measured."""
    engine_drift: Differences | None = None
    """Of y': in fp32 minus as the engine of others did when it sampled it; None where the engine is our own."""
    seconds: float


class ComparedLogProb(Record):
    """The sequence log-prob of a sentence, here and in transformers."""

    text: str
    prompt_tokens: int
    response_tokens: int
    ours: float
    transformers: float

    @property
    def difference(self) -> float:
        """Relative."""
        return abs(self.ours - self.transformers) / abs(self.transformers)


class Verification(Record):
    """The card of a conversion: what was compared with transformers in float64, and how far it was off."""

    sentences: list[ComparedLogProb]
    layers: list[float]
    """Of each decoder layer, the largest relative difference of a sequence's hidden states."""
    log_prob_bound: float
    hidden_bound: float
    shortest_window: int | None
    """Keys that a query sees where it sees the fewest; longer sentences show whether that is right."""
    family: str
    layout: str
    versions: dict[str, str]
    commit: str | None
    source: str = ""
    """The HF folder."""
    source_digest: str = ""
    """SHA-256 over its config.json and weights."""

    @property
    def worst(self) -> ComparedLogProb:
        """The sentence that differs most; one that is not a number is the worst of all."""
        return max(self.sentences, key=lambda each: each.difference if each.difference >= 0 else math.inf)

    @property
    def longest(self) -> int:
        """Tokens of the longest sentence."""
        return max(each.prompt_tokens + each.response_tokens for each in self.sentences)

    @property
    def first_departing_layer(self) -> int | None:
        """From 0; None if all layers are within the bound."""
        return next((layer for layer, off in enumerate(self.layers) if not off <= self.hidden_bound), None)

    @property
    def holds(self) -> bool:
        """Whether everything is within its bound."""
        return self.worst.difference <= self.log_prob_bound and self.first_departing_layer is None

    def summary(self) -> str:
        """In one line."""
        worst, layer = self.worst, self.first_departing_layer
        text = (
            f"largest relative difference of {len(self.sentences)} sequence log-probs is {worst.difference:.2e} (bound "
            f"{self.log_prob_bound:.0e}): {worst.ours:.6f} here, {worst.transformers:.6f} in transformers, of "
            f"{worst.text!r}; "
        )
        if layer is not None:
            off = self.layers[layer]
            return f"{text}layer {layer} is the first that departs, by {off:.2e} (bound {self.hidden_bound:.0e})"
        return f"{text}the {len(self.layers)} layers' states are off by at most {max(self.layers):.2e}"


class DecodingResult(Record):
    """Held-out answers under one way of decoding."""

    num_prompts: int
    accuracy: float | None
    """Mean score; an answer that did not end scores 0. None without a scorer."""
    standard_error: float | None
    ended_share: float
    mean_tokens: float


class Evaluation(Record):
    """The policy after `iteration` self-play iterations, on the held-out examples."""

    iteration: int
    """0 is the initial policy."""
    greedy: DecodingResult | None
    sampled: DecodingResult | None
    log_prob_annotated: float
    """Mean sequence log-prob of the annotated held-out answers."""
    log_prob_sampled: float | None
    """Mean sequence log-prob of the sampled held-out answers."""
    nll_per_token: float
    """Negative log-prob of the annotated held-out answers per response token."""
    made_from: dict[str, Any] = {}
    """What the results depend on: digests of policy, examples and scorer, and how answers were decoded."""


class RolloutSummary(Record):
    """What the opponent's (or the initial policy's) answers to the training prompts look like."""

    num_responses: int
    ended_share: float
    empty_share: float
    """Share of responses that consist of the token that ended them alone."""
    identical_share: float | None
    """Share equal to the annotated response."""
    mean_tokens: float
    mean_log_prob: float
    endings: dict[str, int] = {}
    """How many responses each token ended, by its text."""
    passed_over: str | None = None
    """Text of a special token that most responses without an end hold and go on after; None if there is none."""


RecordType = TypeVar("RecordType", bound=Record)


def read_records(path: Path, kind: type[RecordType]) -> Iterator[RecordType]:
    """Reads a JSONL file that this project wrote.

    Raises:
        InputError: The file is missing, or a line is torn; names file and line.
        ArtifactError: A line has other fields; names file and line.
    """
    for number, value in read_json_lines(path):
        try:
            yield kind.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise ArtifactError(f"{path}:{number}: field `{name}`: {first['msg']}") from error


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of a JSONL file that this project wrote, blank lines skipped.

    Raises:
        InputError: The file is missing, or a line is not UTF-8 or not a JSON object; names file and line.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if not raw.strip():
                continue
            try:
                value = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise InputError(f"{path}:{number}: not valid UTF-8 at byte {error.start}") from error
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(value, dict):
                raise InputError(f"{path}:{number}: expected a JSON object, found {type(value).__name__}")
            yield number, value
