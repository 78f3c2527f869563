"""What a text becomes: the one place that makes prompt and response ids, for training, scoring and generation alike."""

import json
import re
from collections.abc import Sequence

from megatron_tspin.config import CHAT_TEMPLATE
from megatron_tspin.data.annotated import Example
from megatron_tspin.data.tokenizer import Tokenizer
from megatron_tspin.storage import sha256_text

RESPONSE_RULE = 3
"""Number of the rule by which texts become ids; documents made by another one are made again."""
PLAIN_TEMPLATE = "{prompt}"
"""The prompt with nothing around it."""


class PromptTemplate:
    """The text around a prompt, and how prompts and responses become ids.

    Args:
        template: Text with `{prompt}` exactly once, or `chat` for the tokenizer's own chat template.
        tokenizer: Encodes the text.
    """

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._is_chat = template == CHAT_TEMPLATE
        self._added_start, self._added_end = ([], []) if self._is_chat else _added(tokenizer)
        self._dropped: dict[str, bool] = {}
        # One look for all of them: some tokenizers have hundreds.
        self._any_special = re.compile("|".join(map(re.escape, tokenizer.special_texts)) or r"(?!)")
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
        before, _, after = self._template.partition(PLAIN_TEMPLATE)
        return before + example.prompt + after

    def special_texts_in(self, example: Example) -> list[str]:
        """Texts of special tokens that an example's own prompt and response hold, and that become those tokens."""
        contents = [message["content"] for message in example.messages or ()] or [example.prompt]
        whole = "\n".join([*contents, example.response])
        if self._any_special.search(whole) is None:
            return []
        return [text for text in self._tokenizer.special_texts if text in whole]

    def prompt_ids(self, examples: Sequence[Example]) -> list[list[int]]:
        """Token ids of each prompt, up to and including the text that introduces the response.

        A plain template gets the tokenizer's special tokens (e.g. BOS) except those after a text; a chat template
        brings its own.

        Raises:
            InputError: The tokenizer has no chat template, or it refuses the messages.
        """
        return self._ids_of_prompts([self.text(example) for example in examples])

    def encode(self, examples: Sequence[Example], closed: bool = True) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of each prompt, as `prompt_ids` makes them, and of each response.

        A response is encoded by itself, as text that goes on: without the space that some tokenizers put in front of
        whatever they encode. So a prompt has the same ids as in generation, no token spans the boundary, and the two
        decode to their joined text wherever the tokenizer loses nothing. A tokenizer that drops the spaces at the end
        of a prompt has the space put in front in their place.

        Args:
            examples: Prompts with responses.
            closed: Let the closing token follow each response that does not end in it.

        Raises:
            InputError: The tokenizer has no chat template, or it refuses the messages.
        """
        texts = [self.text(example) for example in examples]
        responses = self._ids_of_responses(texts, [example.response for example in examples])
        if closed:
            closing = self._tokenizer.endings.closing
            responses = [ids if ids[-1:] == [closing] else [*ids, closing] for ids in responses]
        return self._ids_of_prompts(texts), responses

    def _ids_of_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        prompts = self._tokenizer.encode_batch(texts, add_special_tokens=not self._is_chat)
        return [self.open_once(ids) for ids in prompts]

    def open_once(self, ids: list[int]) -> list[int]:
        """Ids of a prompt as the tokenizer makes them, without what it puts after a text, and with one BOS, not two.

        A second one is there where the template, or the prompt itself, begins with the text of BOS.
        """
        start, end = self._added_start, self._added_end
        if start and ids[: 2 * len(start)] == [*start, *start]:
            ids = ids[len(start) :]
        return ids[: -len(end)] if end and ids[-len(end) :] == end else ids

    def _ids_of_responses(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        encoded = self._tokenizer.encode_continuations(responses)
        after_lost = [i for i, pair in enumerate(zip(prompts, responses, strict=True)) if self._loses_space(*pair)]
        again = self._tokenizer.encode_batch([responses[i] for i in after_lost], add_special_tokens=False)
        for index, ids in zip(after_lost, again, strict=True):
            encoded[index] = ids
        return encoded

    def _loses_space(self, prompt: str, response: str) -> bool:
        """Whether there is white space between the two that the tokenizer drops at the edge of a text."""
        return any(self._drops(edge) for edge in (prompt[-1:], response[:1]) if edge.isspace())

    def _drops(self, space: str) -> bool:
        if space not in self._dropped:
            without, with_space = self._tokenizer.encode_batch(["a", f"a{space}"], add_special_tokens=False)
            self._dropped[space] = without == with_space
        return self._dropped[space]


def _added(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text; not asked of an empty one, where they may mix."""
    (bare,), (whole,) = (tokenizer.encode_batch(["a"], add_special_tokens=special) for special in (False, True))
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return whole[:at], whole[at + len(bare) :]
    return [], []
