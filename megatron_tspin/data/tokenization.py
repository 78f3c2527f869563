"""The `tokenize` stage: annotated examples become normalised examples and token documents."""

import datetime
from pathlib import Path
from typing import Any

from megatron_tspin.config import CHAT_TEMPLATE, Config
from megatron_tspin.data.annotated import Example, write_examples
from megatron_tspin.data.encoding import Encoder
from megatron_tspin.data.endings import endings_of_run
from megatron_tspin.data.indexed import open_documents, write_documents
from megatron_tspin.data.template import RESPONSE_RULE, PromptTemplate
from megatron_tspin.data.tokenizer import Tokenizer
from megatron_tspin.data.tokenizer_export import COMPARED, becomes_another, check_exportable
from megatron_tspin.data.tokenizer_loading import load_tokenizer
from megatron_tspin.data.user_examples import read_annotated
from megatron_tspin.data.vocabulary import check_vocabulary, model_vocab_size
from megatron_tspin.errors import ArtifactError
from megatron_tspin.log import get_logger
from megatron_tspin.run_folder import HELD_OUT, TRAIN, RunFolder, document_stem, examples_path
from megatron_tspin.storage import sha256_file

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

    All input is checked before anything is written. Outputs that were made from the same input are left as they are.

    Raises:
        InputError: The tokenizer or the examples cannot be used; all errors of a file in one message.
    """
    sources = {TRAIN: Path(config.data.annotated)}
    if config.data.held_out is not None:
        sources[HELD_OUT] = Path(config.data.held_out)
    examples = {split: read_annotated(path) for split, path in sources.items()}
    _warn_of_overlap(examples)
    tokenizer = load_run_tokenizer(config)
    template = PromptTemplate(config.data.template, tokenizer)
    logger.info("responses: %s", _shown_endings(tokenizer))
    for read in examples.values():
        tokenizer.check(text for item in read[:COMPARED] for text in (template.text(item), item.response))
    encoder = Encoder(config, template, tokenizer.endings.stops)
    facts = {split: _facts(config, split, path, template, tokenizer) for split, path in sources.items()}
    folder = RunFolder(Path(config.run_dir)).data
    stale = {split: path for split, path in sources.items() if not _is_current(folder, split, facts[split])}
    encoded = {split: encoder.encode(path, split, examples[split]) for split, path in stale.items()}
    if TRAIN in encoded and becomes_another(config):
        check_exportable(config, encoded[TRAIN].first(COMPARED))
    for split, found in encoded.items():
        write_examples(examples_path(folder, split), found.examples)
        whole = facts[split] | {"examples_sha256": sha256_file(examples_path(folder, split))}
        vocab_size = facts[split]["vocab_size"]
        write_documents(document_stem(folder, split, "prompt"), found.prompts, vocab_size, whole)
        write_documents(document_stem(folder, split, "annotated"), found.responses, vocab_size, whole)
        logger.info("%s: %d examples in %s", split, len(found.examples), folder)


def _shown_endings(tokenizer: Tokenizer) -> str:
    """What ends them, for people."""
    closing, *others = (
        f"{tokenizer.token_text(token)!r} ({token})"
        for token in [tokenizer.endings.closing, *sorted(tokenizer.endings.stops - {tokenizer.endings.closing})]
    )
    also = f"; sampled ones stop at {', '.join(others)} too" if others else ""
    return f"annotated ones close with {closing}{also} (data.closing_token changes that)"


def _facts(config: Config, split: str, source: Path, template: PromptTemplate, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that decides about the documents of a split."""
    return {
        "split": split,
        "source_sha256": sha256_file(source),
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


def _warn_of_overlap(examples: dict[str, list[Example]]) -> None:
    seen = {example.prompt for example in examples[TRAIN]}
    shared = sum(example.prompt in seen for example in examples.get(HELD_OUT, []))
    if shared:
        logger.warning("%d held-out prompts are also training prompts; their evaluation is not held out", shared)
