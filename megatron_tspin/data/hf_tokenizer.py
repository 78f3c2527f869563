"""An HF fast tokenizer, loaded through transformers."""

import datetime
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from megatron_tspin.config import TokenizerRules
from megatron_tspin.data.continuation import without_prefix
from megatron_tspin.data.endings import endings_text, resolve_endings
from megatron_tspin.data.tokenizer_rules import SAMPLE, by_rules, check_rules
from megatron_tspin.errors import InputError
from megatron_tspin.storage import sha256_text

DATE_FUNCTION = "strftime_now"
"""By which transformers' chat templates reach the date, the only thing outside the checkpoint that they can reach."""


class HFTokenizer:
    """A `Tokenizer` over a folder with `tokenizer.json`.

    Args:
        folder: The HF folder.
        threads: Threads of a batch; the library's pool is made once in a process.
        checkpoint: Folder whose configs name the ids that end a response.
        rules: Whom to believe where transformers and tokenizer.json differ; None refuses that.
    """

    def __init__(self, folder: Path, threads: int, checkpoint: Path, rules: TokenizerRules | None) -> None:
        self._folder = folder
        os.environ["RAYON_NUM_THREADS"] = str(threads)
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        self._tokenizer = _load(folder)
        self._checked = rules is None
        self._backend = self._tokenizer.backend_tokenizer
        if rules == "tokenizer.json":
            self._backend = by_rules(folder / "tokenizer.json")
        self._backend.no_truncation()  # tokenizer.json may carry both, and either would change ids unseen
        self._backend.no_padding()
        self.check(SAMPLE)
        self._continuing = without_prefix(self._backend)
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, facts in added.items() if facts.special)
        self.date = datetime.date.today()
        self.special_texts = tuple(added[token].content for token in sorted(self.special_ids))
        self.endings = resolve_endings(self._tokenizer.eos_token_id, self.token_text, checkpoint)
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        parts = [json.loads(self._backend.to_str()), self._tokenizer.chat_template]
        self._rules_digest = sha256_text(json.dumps(parts, sort_keys=True))

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of what decides about ids."""
        parts = [self._rules_digest, endings_text(self.endings)]
        if DATE_FUNCTION in str(self._tokenizer.chat_template):
            parts.append(self.date.isoformat())
        return sha256_text(json.dumps(parts))

    def check(self, texts: Iterable[str]) -> None:
        """Demands, unless it was said whom to believe, that texts have the ids that tokenizer.json gives them.

        Raises:
            InputError: A text has others.
        """
        if self._checked:
            kind = type(self._tokenizer).__name__
            check_rules(self._folder / "tokenizer.json", self._backend, kind, texts)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that go on from another one."""
        return [encoding.ids for encoding in self._continuing.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens and ids beyond the vocabulary left out."""
        stops = self.endings.stops  # not all of them are special
        kept = [token for token in ids if token not in stops]
        text: str = self._backend.decode(kept, skip_special_tokens=True)
        return text

    def token_id(self, text: str) -> int | None:
        """The id of the token with exactly this text."""
        found: int | None = self._backend.token_to_id(text)
        return found

    def token_text(self, token: int) -> str:
        """A token as its vocabulary writes it."""
        return self._backend.id_to_token(token) or f"<no token {token}>"

    def render_chat(self, messages: Sequence[dict[str, str]], generation_prompt: bool = True) -> str:
        """The messages in the chat format.

        Raises:
            InputError: There is no chat template, or it refuses the messages.
        """
        if self._tokenizer.chat_template is None:
            raise InputError(
                f"{self._folder}: the tokenizer has no chat template; give --template a text with {{prompt}} instead"
            )
        try:
            with _today_is(self.date):
                text: str = self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=generation_prompt
                )
        except Exception as error:  # a template raises whatever its expressions raise
            roles = [message["role"] for message in messages]
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{self._folder}: the chat template refuses messages of {roles}: {reason}") from error
        return text


@contextmanager
def _today_is(date: datetime.date) -> Iterator[None]:
    """Within the block, what transformers gives chat templates as `strftime_now` knows no other day.

    It is a global of their environment and no argument: functions among the arguments are turned into texts.
    """
    module: Any = chat_template_utils
    original = module.datetime
    module.datetime = SimpleNamespace(now=lambda: datetime.datetime.combine(date, datetime.time(12)))
    try:
        yield
    finally:
        module.datetime = original


def _load(folder: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the loaders raise whatever their parsers raise
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: the tokenizer cannot be loaded: {type(error).__name__}: {reason}") from error
    if not tokenizer.is_fast:
        raise InputError(f"{folder}: {type(tokenizer).__name__} is no fast tokenizer; tokenizer.json is not used")
    return tokenizer
