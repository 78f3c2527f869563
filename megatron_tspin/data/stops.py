"""Where a sampled answer stops: at the tokens that end a response, and at what a run adds to them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_tspin.data.tokenizer import Tokenizer

_BYTES_OF_A_TOKEN = 16
"""Of a text, so many tokens back are looked at at least: a stop may begin within a token."""


@dataclass(frozen=True)
class Stops:
    """What ends an answer.

    Attributes:
        ids: Tokens.
        texts: Texts; the token that completes one is the answer's last.
        tokenizer: Decodes, if there are texts.
    """

    ids: frozenset[int]
    texts: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None

    def end(self, ids: Sequence[int]) -> bool:
        """Whether an answer that has not ended so far ends with its last token."""
        if ids[-1] in self.ids:
            return True
        if not self.texts or self.tokenizer is None:
            return False
        tail = ids[-_BYTES_OF_A_TOKEN - max(map(len, self.texts)) :]
        text = self.tokenizer.decode(tail)
        return any(stop in text for stop in self.texts)


def stops_of_run(added: Iterable[str], tokenizer: Tokenizer) -> Stops:
    """The tokens that end a response by the tokenizer's files and the run, and `generation.stop`.

    Args:
        added: Of each stop its id, if it is a whole number, or its text; that of a special token means the token.
        tokenizer: The run's.
    """
    ids, texts = set(tokenizer.endings.stops), []
    for stop in added:
        token = int(stop) if stop.isdecimal() else tokenizer.token_id(stop)
        if token is not None and (stop.isdecimal() or token in tokenizer.special_ids):
            ids.add(token)
        else:
            texts.append(stop)
    return Stops(frozenset(ids), tuple(texts), tokenizer)
