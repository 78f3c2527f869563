"""Which tokens end a response: the one that closes an annotated one, and all at which a sampled one stops.

Published checkpoints name several: a tokenizer's EOS, a list in generation_config.json, the token with which a chat
template closes a turn. Sampling stops at any of them, as transformers' `generate` does with the list; training closes y
with one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tspin.errors import InputError
from megatron_tspin.storage import read_json

if TYPE_CHECKING:
    from megatron_tspin.data.tokenizer import Tokenizer

_QUESTION, _ANSWER = "QUESTION", "ANSWER"


@dataclass(frozen=True)
class Endings:
    """Token ids that end a response."""

    closing: int
    """Follows an annotated response."""
    stops: frozenset[int]
    """A sampled response ends with the first of these; the closing one is among them."""

    def closed_by(self, closing: int) -> "Endings":
        """The same with another closing token."""
        return Endings(closing, self.stops | {closing})


def resolve_endings(own: int | None, text_of: Callable[[int], str], folder: Path) -> Endings:
    """What ends a response where no chat template says it.

    A response closes with the tokenizer's own EOS, else with the first id that the checkpoint's configs name. A padding
    token among several candidates is passed over: in a list of ids at which to stop it is there for safety.

    Args:
        own: The tokenizer's EOS id, None if it has none.
        text_of: The text of a token.
        folder: Where generation_config.json and config.json may be.

    Raises:
        InputError: No EOS anywhere.
    """
    candidates = [*([] if own is None else [own]), *ids_of_configs(folder)]
    if not candidates:
        raise InputError(
            f"{folder}: the tokenizer has no EOS token, and neither generation_config.json nor config.json names an "
            "eos_token_id, so no response could end; set `eos_token` in tokenizer_config.json"
        )
    closing = next((token for token in candidates if "pad" not in text_of(token).lower()), candidates[0])
    return Endings(closing, frozenset(candidates))


def endings_text(endings: Endings) -> str:
    """What a fingerprint takes in of them."""
    return f"{endings.closing} of {sorted(endings.stops)}"


def ids_of_configs(folder: Path) -> list[int]:
    """The ids at which transformers' `generate` would stop: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        if not (folder / name).is_file():
            continue
        found: Any = read_json(folder / name)
        value = found.get("eos_token_id") if isinstance(found, dict) else None
        ids = value if isinstance(value, list) else [value]
        whole = [token for token in ids if isinstance(token, int) and not isinstance(token, bool) and token >= 0]
        if whole:
            return whole
    return []


def endings_of_run(tokenizer: "Tokenizer", chat: bool, closing_token: str | None) -> Endings:
    """What ends a response of a run.

    Args:
        tokenizer: With what its own files say of endings.
        chat: Prompts are rendered by the chat template, whose token after an answer then closes a response.
        closing_token: Text of the token that closes a response, whatever the files say; None asks them.

    Raises:
        InputError: The tokenizer has no token of that text.
    """
    if closing_token is not None:
        identifier = tokenizer.token_id(closing_token)
        if identifier is None:
            raise InputError(f"data.closing_token = {closing_token!r}: the tokenizer has no single token of that text")
        return tokenizer.endings.closed_by(identifier)
    closing = _closing_of_chat(tokenizer) if chat else None
    return tokenizer.endings if closing is None else tokenizer.endings.closed_by(closing)


def _closing_of_chat(tokenizer: "Tokenizer") -> int | None:
    """The first added token after an answer as the chat template renders it; None if it renders none there."""
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.render_chat(messages, generation_prompt=False)
    except InputError:
        return None  # it knows no answers; prompts that it refuses are reported where they are rendered
    _, _, after = text.rpartition(_ANSWER)
    (ids,) = tokenizer.encode_batch([after], add_special_tokens=False)
    return next((token for token in ids if token in tokenizer.special_ids), None)
