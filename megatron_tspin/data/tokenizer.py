"""What the project asks of a tokenizer."""

import datetime
from collections.abc import Iterable, Sequence
from typing import Protocol

from megatron_tspin.data.endings import Endings


class Tokenizer(Protocol):
    """Text to token ids and back."""

    endings: Endings
    """Which tokens end a response; a run may know better than the tokenizer's own files."""
    date: datetime.date
    """Today's, for a chat template that asks for it; a run sets its own."""
    special_texts: tuple[str, ...]
    """Texts that become special tokens wherever they stand."""
    special_ids: frozenset[int]
    """Tokens that stand for no text of their own, such as BOS and those around a turn."""
    vocab_size: int
    """Largest id + 1, added tokens included."""

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all that decides about ids: vocabulary, rules, special tokens, chat template, endings."""
        ...

    def check(self, texts: Iterable[str]) -> None:
        """Compares the ids of texts with those of the file that defines the tokenizer.

        Raises:
            InputError: They differ, and it was not said whom to believe.
        """
        ...

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text; `add_special_tokens` adds e.g. BOS as the tokenizer was made to."""
        ...

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that go on from another one: no special tokens, and no space put in front."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out."""
        ...

    def token_id(self, text: str) -> int | None:
        """The id of the token with exactly this text; None if there is none."""
        ...

    def token_text(self, token: int) -> str:
        """A token as its vocabulary writes it."""
        ...

    def render_chat(self, messages: Sequence[dict[str, str]], generation_prompt: bool = True) -> str:
        """The messages in the tokenizer's chat format, up to where the assistant starts to answer.

        Args:
            messages: A conversation.
            generation_prompt: Add what introduces the answer.

        Raises:
            InputError: There is no chat template, or it refuses the messages.
        """
        ...
