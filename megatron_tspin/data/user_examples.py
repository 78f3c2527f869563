"""The JSONL files of examples that people write: one reader for every command, and one set of errors."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from megatron_tspin.data.annotated import Example
from megatron_tspin.data.problems import Problems, listed
from megatron_tspin.data.turns import first_turn, joined, last_user_turn, shown, text_of, without_earlier_turns
from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger
from megatron_tspin.storage import parse_json

Parsed = TypeVar("Parsed")

_OTHER_ENCODINGS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "compressed (gzip)",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet file",
    b"[\n": "a JSON list",
}
MOST_LINE_BYTES = 4 * 2**20
"""A line is refused by its size before it is parsed or tokenized, which takes hundreds of times the memory."""

logger = get_logger(__name__)


@dataclass(frozen=True)
class TokenIds:
    """A prompt and a response that are token ids already."""

    id: str
    prompt_ids: list[int]
    response_ids: list[int]


def read_annotated(path: Path) -> list[Example]:
    """Reads prompts with annotated responses.

    A line has `prompt` and `response`, or `messages` (of which the first turn is taken: the response is the first
    assistant message; conversations that go on are counted in a warning). `id` is optional and defaults to the line
    number. Blank lines are skipped.

    Raises:
        InputError: The file is missing or empty, or lines cannot be used; all of them in one message, as `file:line`.
    """
    needs = "`prompt` and `response`, or `messages`"
    examples = _read(path, lambda record, identifier: _annotated(record, identifier, needs), needs)
    _warn_of_cut_turns(path, examples)
    return examples


def read_prompts(path: Path) -> list[Example]:
    """Reads prompts to answer; a response is not needed.

    A line has `prompt`, or `messages`, of which the last user message is answered. A chat template reads all that comes
    before it too; a plain one can say no more than the system messages, which `warn_of_lost_turns` tells.

    Raises:
        InputError: As for `read_annotated`.
    """
    return _read(path, _prompt, "`prompt`, or `messages`")


def read_scored(path: Path, vocab_size: int) -> list[Example | TokenIds]:
    """Reads responses to score: lines of annotated examples, or of `prompt_ids` and `response_ids`.

    Args:
        path: The file.
        vocab_size: Ids have to be below this.

    Raises:
        InputError: As for `read_annotated`, or ids are outside of the vocabulary.
    """
    needs = "`prompt` and `response`, or `messages`, or `prompt_ids` and `response_ids`"

    def parse(record: dict[str, Any], identifier: str) -> Example | TokenIds:
        if "prompt_ids" not in record:
            return _annotated(record, identifier, needs)
        prompt, response = (_ids(record, key, vocab_size) for key in ("prompt_ids", "response_ids"))
        return TokenIds(identifier, prompt, response)

    found = _read(path, parse, needs)
    _warn_of_cut_turns(path, [item for item in found if isinstance(item, Example)])
    return found


def warn_of_lost_turns(path: Path, examples: Sequence[Example]) -> None:
    """Says of whose messages a template that knows no roles leaves earlier turns out."""
    lost = [item.id for item in examples if item.messages and any(m["role"] == "assistant" for m in item.messages)]
    if lost:
        logger.warning(
            "%s: the template knows no turns, so only the last user message of a conversation is answered, without "
            "those before it, in %d of %d: %s; `--template chat` reads them all",
            path,
            len(lost),
            len(examples),
            listed(lost),
        )


def line_numbers(path: Path) -> list[int]:
    """The line (from 1) of each example of a file that was read, for error messages of later stages."""
    return [number for number, _ in _lines(path)]


def _read(path: Path, parse: Callable[[dict[str, Any], str], Parsed], needs: str) -> list[Parsed]:
    """What `parse` makes of each line's object and id."""
    problems = Problems()
    found: list[Parsed] = []
    first_line: dict[str, int] = {}
    for number, raw in _lines(path):
        try:
            record = _json_object(raw)
            identifier = _identifier(record.get("id", number))
            found.append(parse(record, identifier))
        except InputError as error:
            problems.add(f"{path}:{number}: {error}")
            continue
        if identifier in first_line:
            problems.add(f"{path}:{number}: id {identifier!r} is already used in line {first_line[identifier]}")
        first_line.setdefault(identifier, number)
    problems.raise_if_any()
    if not found:
        raise InputError(f"{path}: no examples; expected a JSON object with {needs} on each line")
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of the lines that are not blank; no more of one is read than may be used."""
    if not path.is_file():
        what = "is not a file, but must be one" if path.exists() else "no such file"
        raise InputError(f"{path}: {what} of examples")
    try:
        with path.open("rb") as stream:
            for number in count(1):
                raw = stream.readline(MOST_LINE_BYTES + 1)
                if not raw:
                    return
                if len(raw) > MOST_LINE_BYTES:
                    raise InputError(
                        f"{path}:{number}: more than {MOST_LINE_BYTES} bytes on one line, which is more than a million "
                        "tokens; an example is one prompt and one response"
                    )
                if number == 1:
                    _refuse_other_encodings(path, raw)
                    raw = raw.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put before UTF-8
                if raw.strip():
                    yield number, raw
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def _refuse_other_encodings(path: Path, start: bytes) -> None:
    found = next((name for mark, name in _OTHER_ENCODINGS.items() if start.startswith(mark)), None)
    if found is not None:
        raise InputError(f"{path}: is {found}, but must be plain JSON Lines in UTF-8")


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        value = parse_json(raw.decode("utf-8"), _refuse_constant)
        if b"\\ud" in raw.lower():  # an escaped half of a surrogate pair is JSON, but no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not valid UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise InputError("holds half of a surrogate pair (an escape such as \\ud800), which is no character") from error
    except json.JSONDecodeError as error:
        if not raw.endswith(b"\n"):
            raise InputError(
                f"not valid JSON, and the file ends here without a line break: it seems to be cut off ({error.msg})"
            ) from error
        raise InputError(f"not valid JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _identifier(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InputError(f"`id` must be a non-empty text or a whole number, found {shown(value)}")
    return str(value)


def _annotated(record: dict[str, Any], identifier: str, needs: str) -> Example:
    if "messages" not in record:
        prompt, response = (text_of(record, key, hint=f"; a line needs {needs}") for key in ("prompt", "response"))
        return Example(id=identifier, prompt=prompt, response=response, record=record)
    _refuse_both(record)
    messages, response = first_turn(record["messages"])
    return Example(id=identifier, prompt=joined(messages), response=response, messages=messages, record=record)


def _prompt(record: dict[str, Any], identifier: str) -> Example:
    if "messages" not in record:
        prompt = text_of(record, "prompt", hint="; a line needs `prompt`, or `messages`")
        return Example(id=identifier, prompt=prompt, response="", record=record)
    _refuse_both(record)
    messages = last_user_turn(record["messages"])
    prompt = joined(without_earlier_turns(messages))
    return Example(id=identifier, prompt=prompt, response="", messages=messages, record=record)


def _refuse_both(record: dict[str, Any]) -> None:
    if "response" in record:
        raise InputError("has both `response` and `messages`; keep one of them")


def _ids(record: dict[str, Any], key: str, vocab_size: int) -> list[int]:
    tokens = record.get(key)
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
        raise InputError(f"`{key}` must be a list of one or more token ids")
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise InputError(f"`{key}` holds ids outside the vocabulary of {vocab_size} tokens")
    return tokens


def _warn_of_cut_turns(path: Path, examples: Sequence[Example]) -> None:
    """Says whose messages go on after the first answer."""
    cut = [item.id for item in examples if item.messages and len(item.record["messages"]) > len(item.messages) + 1]
    if cut:
        logger.warning(
            "%s: only the first turn of a conversation is used; %d of %d go on after it: %s",
            path,
            len(cut),
            len(examples),
            listed(cut),
        )
