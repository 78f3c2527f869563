"""Annotated examples as a run keeps them: normalised, one line a document."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_tspin.records import Record, read_records
from megatron_tspin.storage import atomic_path


class Example(Record):
    """A prompt with its annotated response."""

    id: str
    prompt: str
    """The prompt as one text; the contents of several messages are separated by blank lines."""
    response: str
    """Empty where a prompt is only to be answered."""
    messages: list[dict[str, str]] | None = None
    """The messages before the response, for chat templates; None if the line had a prompt and no system text."""
    record: dict[str, Any]
    """The user's whole line, for scorers."""


def read_examples(path: Path) -> list[Example]:
    """Reads what `write_examples` wrote.

    Raises:
        InputError: The file is missing or a line is torn.
    """
    return list(read_records(path, Example))


def read_ids(path: Path) -> list[str]:
    """The ids alone, in order, of what `write_examples` wrote.

    Raises:
        InputError: As `read_examples`.
    """
    return [example.id for example in read_records(path, Example)]


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Writes normalised examples atomically, one JSON line each."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(example.line() for example in examples)
