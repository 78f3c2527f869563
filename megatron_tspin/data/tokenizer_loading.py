"""How a tokenizer is found on disk."""

from pathlib import Path

from megatron_tspin.data.tokenizer import Tokenizer
from megatron_tspin.errors import InputError


def load_tokenizer(path: str, threads: int = 1) -> Tokenizer:
    """Loads an HF folder with `tokenizer.json`, or a SentencePiece model.

    Nothing is downloaded and no code of the folder is run.

    Args:
        path: Folder with `tokenizer.json` or `tokenizer.model`, or a SentencePiece `.model` file.
        threads: Threads that encode a batch. For HF tokenizers the first one of a process decides.

    Raises:
        InputError: There is no tokenizer at `path`, it cannot be read, or nothing says which token ends a response.
    """
    location = Path(path)
    if location.is_dir() and (location / "tokenizer.json").is_file():
        from megatron_tspin.data.hf_tokenizer import HFTokenizer  # slow to import, and the driver needs none

        return HFTokenizer(location, threads)
    model = location / "tokenizer.model" if location.is_dir() else location
    if model.is_file() and model.suffix == ".model":
        from megatron_tspin.data.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer(model, threads)
    raise InputError(
        f"{path}: no tokenizer found: expected a folder with tokenizer.json or tokenizer.model, or a SentencePiece "
        "file named *.model. A folder with vocab.json and merges.txt gets its tokenizer.json from transformers: "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    )
