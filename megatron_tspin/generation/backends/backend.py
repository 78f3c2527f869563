"""What the rest of generation asks of whoever answers prompts."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_tspin.generation.sampling import Decoding


@dataclass(frozen=True)
class PromptRequest:
    """One answer that is wanted.

    Attributes:
        index: By which the answer is handed back.
        ids: Token ids of the prompt, one or more.
        seed: Of the answer's randomness (`sampling.answer_seed`): nothing else may decide what is sampled.
    """

    index: int
    ids: Sequence[int]
    seed: int


@dataclass
class Answer:
    """A response while it grows, and when it is complete.

    Attributes:
        ids: Its tokens, the stop included.
        log_probs: Of each token, at temperature 1 and without truncation: what training scores.
        ended: Whether the last token is a stop.
    """

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ended: bool = False


class Backend(Protocol):
    """Answers prompts.

    Attributes:
        facts: What the answers depend on besides the policy, the prompts and the decoding; kept beside them.
    """

    facts: dict[str, Any]

    def answers(self, requests: Sequence[PromptRequest], decoding: Decoding) -> Generator[tuple[int, Answer]]:
        """Each request's index with its answer as soon as that is complete, in any order, each once.

        All ranks of a replica call it with the same requests and see the same answers in the same order. Who stops
        taking answers gives up those that are not complete.

        Raises:
            DivergenceError: A log-prob is not finite.
        """
        ...

    def close(self) -> None:
        """Gives back what it holds; nothing is asked of it afterwards."""
        ...
