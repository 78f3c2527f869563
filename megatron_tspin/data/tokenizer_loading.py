"""How a tokenizer is found on disk."""

from pathlib import Path

from megatron_tspin.config import TokenizerRules
from megatron_tspin.data.problems import listed
from megatron_tspin.data.tokenizer import Tokenizer
from megatron_tspin.errors import InputError
from megatron_tspin.storage import read_json, read_text

_DATE_FUNCTION = "strftime_now"
_HF_FILE = "tokenizer.json"


def load_tokenizer(
    path: str, threads: int = 1, checkpoint: Path | None = None, rules: TokenizerRules | None = None
) -> Tokenizer:
    """Loads an HF folder with `tokenizer.json`, or a SentencePiece model.

    Nothing is downloaded and no code of the folder is run.

    Args:
        path: Folder with `tokenizer.json` or `tokenizer.model`, or a SentencePiece `.model` file.
        threads: Threads that encode a batch. For HF tokenizers the first one of a process decides.
        checkpoint: Folder of the model, whose configs name ids that end a response [the tokenizer's own].
        rules: Whom to believe where transformers and tokenizer.json differ; None refuses that.

    Raises:
        InputError: There is no tokenizer at `path`, it cannot be read, or nothing says which token ends a response.
    """
    file = tokenizer_file(Path(path))
    refuse_added_tokens(file)
    if file.name == _HF_FILE:
        from megatron_tspin.data.hf_tokenizer import HFTokenizer  # slow to import, and the driver needs none

        return HFTokenizer(file.parent, threads, checkpoint or file.parent, rules)
    from megatron_tspin.data.sentencepiece_tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(file, threads, checkpoint or file.parent)


def tokenizer_file(location: Path) -> Path:
    """The file that defines a tokenizer: `tokenizer.json`, or a SentencePiece model.

    Args:
        location: A folder, or a SentencePiece `.model` file.

    Raises:
        InputError: There is none.
    """
    if location.is_dir() and (location / _HF_FILE).is_file():
        return location / _HF_FILE
    model = location / "tokenizer.model" if location.is_dir() else location
    if model.is_file() and model.suffix == ".model":
        return model
    raise InputError(
        f"{location}: no tokenizer found: expected a folder with tokenizer.json or tokenizer.model, or a SentencePiece "
        "file named *.model. A folder with vocab.json and merges.txt gets its tokenizer.json from transformers: "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    )


def asks_for_the_date(location: Path) -> bool:
    """Whether the chat template beside a tokenizer asks for today's date (`strftime_now`)."""
    folder = location if location.is_dir() else location.parent
    names = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
    return any(_DATE_FUNCTION in read_text(folder / name) for name in names if (folder / name).is_file())


def refuse_added_tokens(file: Path) -> None:
    """Refuses a SentencePiece model with tokens beside it that the model lacks; imports no torch and no transformers.

    Args:
        file: As `tokenizer_file` found it. A tokenizer.json holds its added tokens itself.

    Raises:
        InputError: Names the tokens, and how to make a tokenizer that knows them.
    """
    if file.name == _HF_FILE:
        return
    largest = _largest_sentencepiece_id(file)
    added = [text for text, number in _added_beside(file.parent).items() if number > largest]
    if added:
        raise InputError(
            f"{file}: the folder adds tokens that a SentencePiece model cannot hold: {listed(added)}; make a "
            "tokenizer.json that does with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )


def _added_beside(folder: Path) -> dict[str, int]:
    """Ids of the tokens that the files beside a SentencePiece model add, by their texts."""
    found: dict[str, int] = {}
    path = folder / "added_tokens.json"
    if path.is_file():
        found |= {text: number for text, number in read_json(path).items() if isinstance(number, int)}
    path = folder / "tokenizer_config.json"
    if path.is_file():
        decoder = read_json(path).get("added_tokens_decoder") or {}
        found |= {facts["content"]: int(number) for number, facts in decoder.items()}
    return found


def largest_token_id(file: Path) -> int:
    """The largest id of a tokenizer's file, added tokens included; imports neither torch nor transformers.

    Args:
        file: As `tokenizer_file` found it.

    Raises:
        InputError: Its library cannot read it.
    """
    return _largest_hf_id(file) if file.name == _HF_FILE else _largest_sentencepiece_id(file)


def _largest_hf_id(file: Path) -> int:
    from tokenizers import Tokenizer as Backend

    try:
        return max(Backend.from_file(str(file)).get_vocab(with_added_tokens=True).values())
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{file}: not a tokenizer: {' '.join(str(error).split())}") from error


def _largest_sentencepiece_id(file: Path) -> int:
    from sentencepiece import SentencePieceProcessor

    try:
        return int(SentencePieceProcessor(model_file=str(file)).get_piece_size()) - 1
    except (RuntimeError, OSError) as error:
        raise InputError(f"{file}: not a SentencePiece model: {' '.join(str(error).split())}") from error
