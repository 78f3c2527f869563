"""Whether a tokenizer fits a model."""

from pathlib import Path

from megatron_tspin.data.tokenizer import Tokenizer
from megatron_tspin.errors import InputError
from megatron_tspin.storage import read_json


def model_vocab_size(hf_checkpoint: Path) -> int:
    """`vocab_size` of the checkpoint's config.json.

    Raises:
        InputError: The file is missing or has no such number.
    """
    path = hf_checkpoint / "config.json"
    config = read_json(path)
    value = config.get("vocab_size") if isinstance(config, dict) else None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{path}: `vocab_size` is {value!r}; expected the number of rows of the embedding")
    return value


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Refuses a tokenizer that can produce ids which the model has no embedding for.

    Raises:
        InputError: An id of the tokenizer is not below `model_vocab_size`; names both numbers.
    """
    largest = max(tokenizer.vocab_size - 1, *tokenizer.endings.stops)
    if largest >= model_vocab_size:
        raise InputError(
            f"the tokenizer's largest id is {largest}, but the model's vocab_size is {model_vocab_size}; "
            "set --tokenizer-model to the tokenizer of this checkpoint, or resize the checkpoint's embedding"
        )
