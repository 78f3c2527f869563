"""What the project asks of a tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_tspin.errors import InputError
from megatron_tspin.storage import read_json


class Tokenizer(Protocol):
    """Text to token ids and back."""

    eos_id: int
    """Closes a response."""
    vocab_size: int
    """Largest id + 1, added tokens included."""
    fingerprint: str
    """Hex SHA-256 of everything that decides about ids: vocabulary, rules, special tokens, chat template."""

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text; `add_special_tokens` adds e.g. BOS as the tokenizer was made to."""
        ...

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that go on from another one: no special tokens, and no space put in front."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out."""
        ...

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The messages in the tokenizer's chat format, up to where the assistant starts to answer.

        Raises:
            InputError: There is no chat template, or it refuses the messages.
        """
        ...


def resolve_eos(own: int | None, folder: Path) -> int:
    """The id that ends a response: the tokenizer's own EOS, else the first that the checkpoint's configs name.

    Args:
        own: The tokenizer's EOS id, None if it has none.
        folder: Where generation_config.json and config.json may be.

    Raises:
        InputError: No EOS anywhere.
    """
    if own is not None:
        return own
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found: Any = read_json(folder / name)
            value = found.get("eos_token_id") if isinstance(found, dict) else None
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(first, int) and not isinstance(first, bool):
                return first
    raise InputError(
        f"{folder}: the tokenizer has no EOS token, and neither generation_config.json nor config.json names an "
        "eos_token_id, so no response could end; set `eos_token` in tokenizer_config.json"
    )
