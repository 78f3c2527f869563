"""The `tokenize` stage: annotated examples become normalised examples and token documents."""

import datetime
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_tspin.config import CHAT_TEMPLATE, Config
from megatron_tspin.data.annotated import Example
from megatron_tspin.data.encoding import EncodedExamples, Encoder
from megatron_tspin.data.endings import endings_of_run
from megatron_tspin.data.indexed import document_writer, open_documents
from megatron_tspin.data.seen_prompts import SeenPrompts
from megatron_tspin.data.sources import source_digest
from megatron_tspin.data.splits import Split, splits_of
from megatron_tspin.data.template import RESPONSE_RULE, PromptTemplate
from megatron_tspin.data.tokenizer import Tokenizer
from megatron_tspin.data.tokenizer_export import COMPARED, becomes_another, check_exportable
from megatron_tspin.data.tokenizer_loading import load_tokenizer
from megatron_tspin.data.vocabulary import check_vocabulary, model_vocab_size
from megatron_tspin.errors import ArtifactError
from megatron_tspin.log import get_logger
from megatron_tspin.run_folder import HELD_OUT, TRAIN, RunFolder, document_stem, examples_path
from megatron_tspin.storage import atomic_path, sha256_file

_READING = (
    "prompt_column", "response_column", "messages_column", "system_column", "id_column", "turns",
    "held_out_fraction", "split_seed",
)  # fmt: skip

logger = get_logger(__name__)


def load_run_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a run, which knows what ends the run's responses, checked against its model.

    Raises:
        InputError: There is none, or it does not fit the model.
    """
    checkpoint, data = Path(config.model.hf_checkpoint), config.data
    location, rules = config.model.tokenizer or str(checkpoint), config.model.tokenizer_rules
    tokenizer = load_tokenizer(location, data.tokenizer_threads, checkpoint, rules)
    tokenizer.endings = endings_of_run(tokenizer, data.template == CHAT_TEMPLATE, data.closing_token)
    if data.template_date is not None:
        tokenizer.date = datetime.date.fromisoformat(data.template_date)
    check_vocabulary(tokenizer, model_vocab_size(checkpoint))
    return tokenizer


def tokenize_run(config: Config) -> None:
    """Writes `data/<split>.jsonl` and the prompt and annotated documents of the training and held-out examples.

    All input is checked before anything gets its name. Outputs that were made from the same input are left as they are.
    Examples go through a few batches at a time, so memory hardly grows with their number.

    Raises:
        InputError: The tokenizer or the examples cannot be used; all errors of a file in one message.
    """
    splits = splits_of(config.data)
    first = {name: _first(split) for name, split in splits.items()}
    tokenizer = load_run_tokenizer(config)
    template = PromptTemplate(config.data.template, tokenizer)
    logger.info("responses: %s", _shown_endings(tokenizer))
    for compared in first.values():
        tokenizer.check(text for item in compared for text in (template.text(item), item.response))
    encoder = Encoder(config, template, tokenizer.endings.stops)
    facts = {name: _facts(config, split, template, tokenizer) for name, split in splits.items()}
    folder = RunFolder(Path(config.run_dir)).data
    stale = [name for name in splits if not _is_current(folder, name, facts[name])]
    if not stale:
        return
    prompts = {name: SeenPrompts(split) for name, split in splits.items()}
    with ExitStack() as staged:  # nothing gets its name before all of it is known to be usable
        for name, split in splits.items():
            examples = prompts[name].watch(split(quiet=name not in stale))
            if name in stale:
                _encode(config, staged, folder, facts[name], encoder.encode(split.source, name, examples))
            else:
                deque(examples, maxlen=0)
        for name in stale:
            prompts[name].warn_of_repeats()
        if HELD_OUT in prompts:
            prompts[HELD_OUT].warn_of_overlap(prompts[TRAIN])


def _encode(
    config: Config, staged: ExitStack, folder: Path, facts: dict[str, Any], batches: Iterable[EncodedExamples]
) -> None:
    """Writes the outputs of a split under temporary names, which they lose when `staged` ends well."""
    name, count, first = facts["split"], 0, EncodedExamples()
    examples = staged.enter_context(atomic_path(examples_path(folder, name)))

    @cache
    def whole() -> dict[str, Any]:  # both documents ask for it; the file is complete by then
        return facts | {"examples_sha256": sha256_file(examples)}

    prompts, responses = (
        staged.enter_context(document_writer(document_stem(folder, name, key), facts["vocab_size"], whole))
        for key in ("prompt", "annotated")
    )
    with examples.open("w", encoding="utf-8", newline="\n") as stream:
        for batch in batches:
            stream.writelines(example.line() for example in batch.examples)
            prompts.extend(batch.prompts)
            responses.extend(batch.responses)
            first.extend(batch.first(COMPARED - len(first.examples)))
            count += len(batch.examples)
    if name == TRAIN and becomes_another(config):
        check_exportable(config, first)
    logger.info("%s: %d examples in %s", name, count, folder)


def _first(split: Split) -> list[Example]:
    """The first examples of a split, as many as are compared."""
    return [located.item for located in islice(split(quiet=True), COMPARED)]


def _shown_endings(tokenizer: Tokenizer) -> str:
    """What ends them, for people."""
    closing, *others = (
        f"{tokenizer.token_text(token)!r} ({token})"
        for token in [tokenizer.endings.closing, *sorted(tokenizer.endings.stops - {tokenizer.endings.closing})]
    )
    also = f"; sampled ones stop at {', '.join(others)} too" if others else ""
    return f"annotated ones close with {closing}{also} (data.closing_token changes that)"


def _facts(config: Config, split: Split, template: PromptTemplate, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that decides about the documents of a split."""
    return {
        "split": split.name,
        "source_sha256": source_digest(split.source),
        "reading": {name: getattr(config.data, name) for name in _READING},
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "template_fingerprint": template.fingerprint,
        "closing_id": tokenizer.endings.closing,
        "stop_ids": sorted(tokenizer.endings.stops),
        "response_rule": RESPONSE_RULE,
        "vocab_size": model_vocab_size(Path(config.model.hf_checkpoint)),
        "seq_length": config.data.seq_length,
        "max_new_tokens": config.generation.max_new_tokens,
        "over_long": config.data.over_long,
    }


def _is_current(folder: Path, split: str, facts: dict[str, Any]) -> bool:
    """Whether whole outputs of the same input are there."""
    path = examples_path(folder, split)
    if not path.is_file():
        return False
    expected = facts | {"examples_sha256": sha256_file(path)}
    try:
        documents = [open_documents(document_stem(folder, split, key)) for key in ("prompt", "annotated")]
    except ArtifactError as error:
        logger.info("%s: tokenizing again: %s", split, error)
        return False
    if any(document.facts != expected for document in documents):
        logger.info("%s: tokenizing again: input, tokenizer, template or limits have changed", split)
        return False
    logger.info("%s: already tokenized, %d examples", split, len(documents[0]))
    return True
