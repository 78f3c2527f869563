"""A SentencePiece model, loaded with the sentencepiece library."""

from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from megatron_tspin.data.continuation import without_dummy_prefix
from megatron_tspin.data.tokenizer import resolve_eos
from megatron_tspin.errors import InputError
from megatron_tspin.storage import sha256_file, sha256_text


class SentencePieceTokenizer:
    """A `Tokenizer` over a `.model` file.

    Args:
        model: The file.
        threads: Threads of a batch.
    """

    def __init__(self, model: Path, threads: int) -> None:
        self._model = model
        self._threads = threads
        try:
            self._processor = SentencePieceProcessor(model_file=str(model))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{model}: not a SentencePiece model: {' '.join(str(error).split())}") from error
        model_bytes: bytes = self._processor.serialized_model_proto()
        self._continuing = SentencePieceProcessor(model_proto=without_dummy_prefix(model_bytes))
        self._bos = _known(self._processor.bos_id())
        self.eos_id = resolve_eos(_known(self._processor.eos_id()), model.parent)
        self.vocab_size = int(self._processor.get_piece_size())
        self.fingerprint = sha256_text(f"{sha256_file(model)} {self.eos_id}")

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
        kept = [token for token in ids if token < self.vocab_size and not self._is_special(token)]
        text: str = self._processor.decode(kept)
        return text

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """Always refused: a SentencePiece model holds no chat template.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"{self._model}: a SentencePiece model has no chat template; give --template a text with {{prompt}}, "
            "or --tokenizer-model an HF folder with a chat template"
        )

    def _is_special(self, token: int) -> bool:
        return token == self.eos_id or bool(self._processor.is_control(token))


def _known(identifier: int) -> int | None:
    """SentencePiece says -1 for a token that the model lacks."""
    return None if identifier < 0 else identifier
