"""Reads what `tspin score` is asked to score: text, or token ids as they are."""

from pathlib import Path

from megatron_tspin.config import Config
from megatron_tspin.data.annotated import Example
from megatron_tspin.data.template import PromptTemplate
from megatron_tspin.data.tokenization import load_run_tokenizer
from megatron_tspin.data.user_examples import TokenIds, read_scored

Pair = tuple[list[int], list[int]]


def read_scoring_input(config: Config, data: Path, vocab_size: int) -> tuple[list[str], list[Pair]]:
    """Returns the ids of the lines and their prompt and response ids.

    Text becomes the ids that training would make of it; ids are scored as they are.

    Raises:
        InputError: A line has neither form, or an id outside the vocabulary; all such lines in one message.
    """
    found = read_scored(data, vocab_size, config.data)
    texts = [item for item in found if isinstance(item, Example)]
    encoded = iter(_encode(config, texts))
    pairs = [(item.prompt_ids, item.response_ids) if isinstance(item, TokenIds) else next(encoded) for item in found]
    return [item.id for item in found], pairs


def _encode(config: Config, texts: list[Example]) -> list[Pair]:
    if not texts:  # and no tokenizer is needed
        return []
    template = PromptTemplate(config.data.template, load_run_tokenizer(config))
    return list(zip(*template.encode(texts), strict=True))
