"""The user's annotated examples: read, checked line by line, normalised."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_tspin.data.problems import Problems
from megatron_tspin.errors import InputError
from megatron_tspin.records import Record, read_records
from megatron_tspin.storage import atomic_path

_ROLES_BEFORE_THE_RESPONSE = ("system", "user")


class Example(Record):
    """A prompt with its annotated response."""

    id: str
    prompt: str
    """The prompt as one text; a system message stands before the user's text, separated by a blank line."""
    response: str
    messages: list[dict[str, str]] | None = None
    """The messages before the response, for chat templates; None if the line had `prompt` and `response`."""
    record: dict[str, Any]
    """The user's whole line, for scorers."""


def read_annotated(path: Path) -> list[Example]:
    """Reads the user's JSONL.

    A line has `prompt` and `response`, or `messages` (of which the first turn is taken: the response is the first
    assistant message). `id` is optional and defaults to the line number. Blank lines are skipped.

    Raises:
        InputError: The file is missing or empty, or lines cannot be used; all of them in one message, as `file:line`.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file of annotated examples")
    problems = Problems()
    examples: list[Example] = []
    first_line: dict[str, int] = {}
    for number, raw in _lines(path):
        try:
            example = _example(_json_object(raw), number)
        except InputError as error:
            problems.add(f"{path}:{number}: {error}")
            continue
        if example.id in first_line:
            problems.add(f"{path}:{number}: id {example.id!r} is already used in line {first_line[example.id]}")
        first_line.setdefault(example.id, number)
        examples.append(example)
    problems.raise_if_any()
    if not examples:
        raise InputError(f"{path}: no examples; expected a JSON object with `prompt` and `response` on each line")
    return examples


def line_numbers(path: Path) -> list[int]:
    """The line (from 1) of each example that `read_annotated` returns, for error messages of later stages."""
    return [number for number, _ in _lines(path)]


def read_examples(path: Path) -> list[Example]:
    """Reads what `write_examples` wrote.

    Raises:
        InputError: The file is missing or a line is torn.
    """
    return list(read_records(path, Example))


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Writes normalised examples atomically, one JSON line each."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(example.line() for example in examples)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put before UTF-8
            if raw.strip():
                yield number, raw


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\ud" in raw.lower():  # an escaped half of a surrogate pair is JSON, but no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not valid UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise InputError("holds half of a surrogate pair (an escape such as \\ud800), which is no character") from error
    except json.JSONDecodeError as error:
        raise InputError(f"not valid JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _example(record: dict[str, Any], number: int) -> Example:
    identifier = _identifier(record.get("id", number))
    if "messages" not in record:
        prompt, response = _text(record, "prompt"), _text(record, "response")
        return Example(id=identifier, prompt=prompt, response=response, record=record)
    if "response" in record:
        raise InputError("has both `response` and `messages`; keep one of them")
    messages, response = _first_turn(record["messages"])
    prompt = "\n\n".join(message["content"] for message in messages)
    return Example(id=identifier, prompt=prompt, response=response, messages=messages, record=record)


def _identifier(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InputError(f"`id` must be a non-empty text or a whole number, found {_shown(value)}")
    return str(value)


def _text(record: dict[str, Any], key: str, place: str = "") -> str:
    name = f"`{place}{key}`"
    if key not in record:
        hint = "" if place else "; a line needs `prompt` and `response`, or `messages`"
        raise InputError(f"{name} is missing{hint}")
    value = record[key]
    if not isinstance(value, str):
        raise InputError(f"{name} must be a text, found {_shown(value)}")
    if not value.strip():
        raise InputError(f"{name} is empty")
    return value


def _first_turn(messages: Any) -> tuple[list[dict[str, str]], str]:
    """The messages before the first assistant message, and that message's text."""
    if not isinstance(messages, list):
        raise InputError(f"`messages` must be a list, found {_shown(messages)}")
    before: list[dict[str, str]] = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InputError(f"`messages[{index}]` must be an object, found {_shown(message)}")
        role = _text(message, "role", f"messages[{index}].")
        content = _text(message, "content", f"messages[{index}].")
        if role == "assistant":
            if not any(earlier["role"] == "user" for earlier in before):
                raise InputError("`messages` has no user message before the first assistant message")
            return before, content
        if role not in _ROLES_BEFORE_THE_RESPONSE:
            raise InputError(f"`messages[{index}].role` is {role!r}; before the response it must be system or user")
        before.append({"role": role, "content": content})
    raise InputError("`messages` has no assistant message")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
