"""The tokenizer of a run as files of an HF checkpoint, from which transformers makes the ids that were trained on."""

import datetime
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tspin.config import CHAT_TEMPLATE, Config
from megatron_tspin.data.encoding import EncodedExamples
from megatron_tspin.data.endings import Endings, ids_of_configs
from megatron_tspin.data.template import PromptTemplate
from megatron_tspin.data.tokenizer_loading import load_tokenizer, tokenizer_file
from megatron_tspin.errors import InputError
from megatron_tspin.storage import read_json, write_json

_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_FOLDERS = ("additional_chat_templates",)
_SHOWN = 12
COMPARED = 64
"""Examples on which a run's tokenizer is compared with that of its export."""


def write_tokenizer(config: Config, folder: Path) -> None:
    """Puts the run's tokenizer into an HF folder, in place of any that is there.

    A SentencePiece model that transformers would read in another way gets a tokenizer.json beside it.

    Args:
        config: The run.
        folder: Has config.json.
    """
    location = Path(config.model.tokenizer or config.model.hf_checkpoint)
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    file = tokenizer_file(location)
    if location.is_dir():
        _copy(location, folder)
        if config.model.tokenizer_rules == "tokenizer.json":
            _let_rules_win(folder / "tokenizer_config.json")
    else:
        shutil.copyfile(location, folder / "tokenizer.model")
    if file.suffix == ".model" and not _adds_the_same(file, folder):
        _convert(file, folder)


def _copy(location: Path, folder: Path) -> None:
    for name in _FILES:
        if (location / name).is_file():
            shutil.copyfile(location / name, folder / name)
    for name in _FOLDERS:
        if (location / name).is_dir():
            shutil.copytree(location / name, folder / name)


def _let_rules_win(settings: Path) -> None:
    """Names the class of transformers that takes tokenizer.json as it is."""
    if settings.is_file():
        write_json(settings, {**read_json(settings), "tokenizer_class": "PreTrainedTokenizerFast"})


def _adds_the_same(model: Path, folder: Path) -> bool:
    """Whether transformers makes of the folder what SentencePiece makes of the model, as far as one word shows it."""
    ours = load_tokenizer(str(model)).encode_batch(["a"], add_special_tokens=True)
    return [_load(folder)("a")["input_ids"]] == ours


def _convert(model: Path, folder: Path) -> None:
    """Writes tokenizer.json: transformers' own conversion of the model, with BOS where SentencePiece's rule puts it."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import processors

    tokenizer, processor = _load(folder), SentencePieceProcessor(model_file=str(model))
    if processor.bos_id() >= 0:
        bos = processor.id_to_piece(processor.bos_id())
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, processor.bos_id())]
        )
    tokenizer.save_pretrained(str(folder))


def becomes_another(config: Config) -> bool:
    """Whether an export's tokenizer has other files than the run's, and so may read in another way."""
    location = Path(config.model.tokenizer or config.model.hf_checkpoint)
    return config.model.tokenizer is not None or tokenizer_file(location).suffix == ".model"


def check_exportable(config: Config, encoded: EncodedExamples) -> None:
    """`check_tokenizer` of what an export will hold, before anything is trained; writes nothing that stays."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copyfile(Path(config.model.hf_checkpoint) / "config.json", folder / "config.json")
        write_tokenizer(config, folder)
        check_tokenizer(config, folder, encoded)


def write_endings(endings: Endings, folder: Path) -> None:
    """Lets generation_config.json and config.json name the ids that end a response, the closing one first.

    Files that name the same ids already keep their bytes.
    """
    if set(ids_of_configs(folder)) == endings.stops:
        return
    ids = [endings.closing, *sorted(endings.stops - {endings.closing})]
    value = ids if len(ids) > 1 else ids[0]
    for path in (folder / "generation_config.json", folder / "config.json"):
        write_json(path, {**(read_json(path) if path.is_file() else {}), "eos_token_id": value})


def check_tokenizer(config: Config, folder: Path, encoded: EncodedExamples) -> None:
    """Demands that transformers, and this package, read the folder's tokenizer as the run read its own.

    Args:
        config: The run.
        folder: An HF folder with a tokenizer.
        encoded: Examples of the run with the ids that it trains on; responses are closed or truncated.

    Raises:
        InputError: It cannot be loaded, or a text has other ids; shows both and says what to do.
    """
    location = config.model.tokenizer or config.model.hf_checkpoint
    try:
        _check(config, folder, encoded)
    except InputError as error:
        raise InputError(
            f"{location}: as part of an HF checkpoint, this tokenizer is another one for transformers: {error}; give "
            "--tokenizer-model a folder with a tokenizer.json that makes the ids that are meant"
        ) from error


def _check(config: Config, folder: Path, encoded: EncodedExamples) -> None:
    examples = encoded.examples
    tokenizer = load_tokenizer(str(folder), rules=config.model.tokenizer_rules)
    if config.data.template_date is not None:
        tokenizer.date = datetime.date.fromisoformat(config.data.template_date)
    template = PromptTemplate(config.data.template, tokenizer)
    again, unclosed = template.encode(examples, closed=False)
    texts = [template.text(item) for item in examples]
    theirs = _ids_by_transformers(folder, texts, special=config.data.template != CHAT_TEMPLATE)
    for item, ids, found in zip(examples, encoded.prompts, again, strict=True):
        _compare(item.id, "prompt", ids, found)
    for item, ids, found in zip(examples, encoded.prompts, theirs, strict=True):
        _compare(item.id, "prompt", ids, template.open_once(found))
    for item, ids, found in zip(examples, encoded.responses, unclosed, strict=True):
        _compare(item.id, "response", ids[: len(found)], found[: len(ids)])


def _ids_by_transformers(folder: Path, texts: Sequence[str], special: bool) -> list[list[int]]:
    """Of prompts as they were rendered; transformers renders a chat template as this package does, through it."""
    tokenizer = _load(folder)
    return [list(tokenizer(text, add_special_tokens=special)["input_ids"]) for text in texts]


def _compare(identifier: str, what: str, ours: Sequence[int], theirs: Sequence[int]) -> None:
    if list(ours) == list(theirs):
        return
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((index for index, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
    part = slice(max(0, at - 2), at + _SHOWN)
    raise InputError(
        f"the {what} of example {identifier!r} has ids {json.dumps(list(ours[part]))} from position {part.start} in "
        f"the run, {json.dumps(list(theirs[part]))} there"
    )


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the loaders raise whatever their parsers raise
        reason = " ".join(str(error).split())
        raise InputError(f"it cannot be loaded: {type(error).__name__}: {reason}") from error
