"""A SentencePiece model, loaded with the sentencepiece library."""

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from megatron_tspin.data.continuation import without_dummy_prefix
from megatron_tspin.data.endings import endings_text, resolve_endings
from megatron_tspin.errors import InputError
from megatron_tspin.storage import sha256_file, sha256_text


class SentencePieceTokenizer:
    """A `Tokenizer` over a `.model` file.

    Args:
        model: The file.
        threads: Threads of a batch.
        checkpoint: Folder whose configs name the ids that end a response.
    """

    def __init__(self, model: Path, threads: int, checkpoint: Path) -> None:
        self._model = model
        self._threads = threads
        try:
            self._processor = SentencePieceProcessor(model_file=str(model))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{model}: not a SentencePiece model: {' '.join(str(error).split())}") from error
        model_bytes: bytes = self._processor.serialized_model_proto()
        self._continuing = SentencePieceProcessor(model_proto=without_dummy_prefix(model_bytes))
        self._bos = _known(self._processor.bos_id())
        self.vocab_size = int(self._processor.get_piece_size())
        self.special_ids = frozenset(filter(self._processor.is_control, range(self.vocab_size)))
        self.date = datetime.date.today()
        self.special_texts: tuple[str, ...] = ()  # a text never becomes a control piece
        self.endings = resolve_endings(_known(self._processor.eos_id()), self.token_text, checkpoint)
        self._model_digest = sha256_file(model)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of what decides about ids."""
        return sha256_text(f"{self._model_digest} {endings_text(self.endings)}")

    def check(self, texts: Iterable[str]) -> None:
        """Nothing to compare: the library itself encodes."""

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text, after BOS if special tokens are asked for and the model has one."""
        start = [] if self._bos is None or not add_special_tokens else [self._bos]
        encoded: list[list[int]] = self._processor.encode(list(texts), out_type=int, num_threads=self._threads)
        return [start + ids for ids in encoded]

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that go on from another one."""
        encoded: list[list[int]] = self._continuing.encode(list(texts), out_type=int, num_threads=self._threads)
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens and ids beyond the vocabulary left out."""
        left_out = self.special_ids | self.endings.stops
        kept = [token for token in ids if token < self.vocab_size and token not in left_out]
        text: str = self._processor.decode(kept)
        return text

    def token_id(self, text: str) -> int | None:
        """The id of the piece with exactly this text."""
        token = int(self._processor.piece_to_id(text))
        return token if self._processor.id_to_piece(token) == text else None

    def token_text(self, token: int) -> str:
        """A piece as the model writes it."""
        known = 0 <= token < self._processor.get_piece_size()
        return str(self._processor.id_to_piece(token)) if known else f"<no token {token}>"

    def render_chat(self, messages: Sequence[dict[str, str]], generation_prompt: bool = True) -> str:
        """Always refused: a SentencePiece model holds no chat template.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"{self._model}: a SentencePiece model has no chat template; give --template a text with {{prompt}}, "
            "or --tokenizer-model an HF folder with a chat template"
        )


def _known(identifier: int) -> int | None:
    """SentencePiece says -1 for a token that the model lacks."""
    return None if identifier < 0 else identifier
