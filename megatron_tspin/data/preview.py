"""The first examples as tokens, for people to look at before anything is written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tspin.config import Config
from megatron_tspin.data.template import PromptTemplate
from megatron_tspin.data.tokenization import load_run_tokenizer
from megatron_tspin.data.user_examples import first_annotated


@dataclass(frozen=True)
class PreviewedToken:
    """A token as the policy reads it.

    Attributes:
        id: Its id.
        text: As the vocabulary writes it.
        special: It stands for no text of its own.
        part: `prompt` or `response`.
    """

    id: int
    text: str
    special: bool
    part: str


def preview(config: Config, count: int) -> Iterator[tuple[str, list[PreviewedToken]]]:
    """The ids of the first training examples and their tokens, closing ones included.

    Raises:
        InputError: As `tokenize_run`, but for lengths.
    """
    tokenizer = load_run_tokenizer(config)
    template = PromptTemplate(config.data.template, tokenizer)
    special = tokenizer.special_ids | tokenizer.endings.stops
    examples = first_annotated(Path(config.data.annotated), config.data, count)
    for example, prompt, response in zip(examples, *template.encode(examples), strict=True):
        parts = {"prompt": prompt, "response": response}
        yield (
            example.id,
            [
                PreviewedToken(token, tokenizer.token_text(token), token in special, part)
                for part, ids in parts.items()
                for token in ids
            ],
        )
