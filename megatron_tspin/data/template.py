"""The one function that makes prompt ids, for training and for generation alike."""

import json
from collections.abc import Sequence

from megatron_tspin.config import CHAT_TEMPLATE
from megatron_tspin.data.annotated import Example
from megatron_tspin.data.tokenizer import Tokenizer
from megatron_tspin.storage import sha256_text

_PLACEHOLDER = "{prompt}"


class PromptTemplate:
    """The text around a prompt, and how it becomes ids.

    Args:
        template: Text with `{prompt}` exactly once, or `chat` for the tokenizer's own chat template.
        tokenizer: Encodes the text.
    """

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._is_chat = template == CHAT_TEMPLATE
        self._drops_eos = not self._is_chat and _adds_eos(tokenizer)
        # The chat template is the tokenizer's and so part of its fingerprint.
        parts = [template, tokenizer.fingerprint] if self._is_chat else [template]
        self.fingerprint: str = sha256_text(json.dumps(parts))
        """Hex SHA-256 of what defines the template."""

    def text(self, example: Example) -> str:
        """The prompt as the policy reads it."""
        if self._is_chat:
            messages = example.messages or [{"role": "user", "content": example.prompt}]
            return self._tokenizer.render_chat(messages)
        # Not str.format: prompts and templates may hold any other braces.
        before, _, after = self._template.partition(_PLACEHOLDER)
        return before + example.prompt + after

    def prompt_ids(self, examples: Sequence[Example]) -> list[list[int]]:
        """Token ids of each prompt, up to and including the text that introduces the response.

        A plain template gets the tokenizer's special tokens (e.g. BOS) except a closing EOS; a chat template brings
        its own.

        Raises:
            InputError: The tokenizer has no chat template, or it refuses the messages.
        """
        texts = [self.text(example) for example in examples]
        prompts = self._tokenizer.encode_batch(texts, add_special_tokens=not self._is_chat)
        if not self._drops_eos:
            return prompts
        return [ids[:-1] if ids[-1:] == [self._tokenizer.eos_id] else ids for ids in prompts]


def _adds_eos(tokenizer: Tokenizer) -> bool:
    """Whether special tokens close a text with EOS; not asked of an empty text, as BOS and EOS may be the same id."""
    (ids,) = tokenizer.encode_batch(["a"], add_special_tokens=True)
    return ids[-1:] == [tokenizer.eos_id]
