"""The examples that people write: one reader for every command, and one set of errors.

Examples are read one at a time. All that is kept of those that went by is sixteen bytes of each id.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from megatron_tspin.config import CHAT_TEMPLATE, DataSection
from megatron_tspin.data.annotated import Example
from megatron_tspin.data.columns import Columns
from megatron_tspin.data.problems import Names, Problems
from megatron_tspin.data.repeats import Repeats
from megatron_tspin.data.sources import MOST_LINE_BYTES, Row, read_rows
from megatron_tspin.data.turns import Turn, answered_turns, asked_turns, joined
from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger

Parsed = TypeVar("Parsed")

_AS_WRITTEN = DataSection(annotated="")  # its other settings have their defaults
_TURN_NAMES = {"first": "the first turn", "last": "the last answered turn", "every": "the answered turns"}

logger = get_logger(__name__)


@dataclass(frozen=True)
class TokenIds:
    """A prompt and a response that are token ids already."""

    id: str
    prompt_ids: list[int]
    response_ids: list[int]


class Located(NamedTuple, Generic[Parsed]):
    """What was read, and where."""

    place: str
    """`file:line`, or `file: row number`."""
    item: Parsed
    row: int
    """Number of the row from 1, over all files of the source; of JSON Lines that of the line."""


def iterate_annotated(
    source: Path,
    data: DataSection = _AS_WRITTEN,
    keep: Callable[[Example], bool] = lambda example: True,
    quiet: bool = False,
) -> Iterator[Located[Example]]:
    """Reads prompts with annotated responses, one at a time.

    A row has `prompt` and `response`, or `messages`, of which `data.turns` says what the response is. Whatever is
    called otherwise, `data` names. Ids are optional and default to the line's number; where every answer of a
    conversation is an example of its own, `/1`, `/2` and so on follow the conversation's.

    Args:
        source: See `sources.read_rows`.
        data: Names columns and turns.
        keep: Leaves out examples for which it is false; they are checked all the same.
        quiet: Warn of nothing.

    Raises:
        InputError: After the last row: the source is empty, or rows cannot be used; all of them in one message, each
            with its place. Nothing is yielded after the first such row.
    """
    needs = _needs(data)
    lost = _LostTurns(source, data)
    parse = _parser(data, needs, lost if not quiet else None)
    for located in _read(source, parse, needs):
        if keep(located.item):
            if not quiet:
                lost.look_at(located.item)
            yield located
    if not quiet:
        lost.warn()


def read_annotated(source: Path, data: DataSection = _AS_WRITTEN) -> list[Example]:
    """All that `iterate_annotated` reads, for small sources.

    Raises:
        InputError: As there.
    """
    return [located.item for located in iterate_annotated(source, data)]


def first_annotated(source: Path, data: DataSection, count: int) -> list[Example]:
    """The first examples, without a look at what comes after them.

    Raises:
        InputError: One of the rows before them cannot be used.
    """
    needs = _needs(data)
    return list(islice(_hastily(source, _parser(data, needs, None)), count))


def read_prompts(source: Path, data: DataSection = _AS_WRITTEN) -> list[Example]:
    """Reads prompts to answer; a response is not needed, and one that is there is left out.

    A row has `prompt`, or `messages`, of which the same turns are asked that `iterate_annotated` takes; a user message
    at the end is a turn too.

    Raises:
        InputError: As for `iterate_annotated`.
    """
    needs = f"`{data.prompt_column}`, or `{data.messages_column or 'messages'}`"
    columns, lost = Columns(data, needs), _LostTurns(source, data)

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        identifier, messages = columns.identifier(record, number), columns.messages(record)
        if messages is None:
            prompt, history = columns.question(record)
            return [Example(id=identifier, prompt=prompt, response="", messages=history, record=record)]
        return _examples(identifier, record, asked_turns(messages, data.turns), data)

    found = [located.item for located in _read(source, parse, needs)]
    for example in found:
        lost.look_at(example)
    lost.warn()
    return found


def read_scored(source: Path, vocab_size: int, data: DataSection = _AS_WRITTEN) -> list[Example | TokenIds]:
    """Reads responses to score: rows of annotated examples, or of `prompt_ids` and `response_ids`.

    Args:
        source: See `sources.read_rows`.
        vocab_size: Ids have to be below this.
        data: Names columns and turns.

    Raises:
        InputError: As for `iterate_annotated`, or ids are outside of the vocabulary.
    """
    needs = f"{_needs(data)}, or `prompt_ids` and `response_ids`"
    columns, lost = Columns(data, needs), _LostTurns(source, data)
    parse_text = _parser(data, needs, lost)

    def parse(record: dict[str, Any], number: int) -> list[Example | TokenIds]:
        if "prompt_ids" not in record:
            return [*parse_text(record, number)]
        prompt, response = (_ids(record, key, vocab_size) for key in ("prompt_ids", "response_ids"))
        return [TokenIds(columns.identifier(record, number), prompt, response)]

    found = [located.item for located in _read(source, parse, needs)]
    for item in found:
        if isinstance(item, Example):
            lost.look_at(item)
    lost.warn()
    return found


def _needs(data: DataSection) -> str:
    return f"`{data.prompt_column}` and `{data.response_column}`, or `{data.messages_column or 'messages'}`"


def _parser(data: DataSection, needs: str, lost: "_LostTurns | None") -> Callable[[dict[str, Any], int], list[Example]]:
    """Makes examples of a row's object and number."""
    columns = Columns(data, needs)

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        identifier, messages = columns.identifier(record, number), columns.messages(record)
        if messages is None:
            prompt, history = columns.question(record)
            response = columns.response(record)
            return [Example(id=identifier, prompt=prompt, response=response, messages=history, record=record)]
        turns = answered_turns(messages, data.turns)
        if lost is not None and turns[-1].last_message + 1 < len(messages):
            lost.going_on.add(identifier)
        return _examples(identifier, record, turns, data)

    return parse


def _examples(identifier: str, record: dict[str, Any], turns: list[Turn], data: DataSection) -> list[Example]:
    return [
        Example(
            id=f"{identifier}/{number}" if data.turns == "every" else identifier,
            prompt=joined(turn.history),
            response=turn.response,
            messages=turn.history,
            record=record,
        )
        for number, turn in enumerate(turns, start=1)
    ]


def _read(source: Path, parse: Callable[[dict[str, Any], int], list[Parsed]], needs: str) -> Iterator[Located[Parsed]]:
    """What `parse` makes of each row's object and number; see `iterate_annotated`."""
    problems, ids = Problems(), Repeats()
    for row in read_rows(source):
        try:
            items = _parsed(row, parse)
        except InputError as error:
            problems.add(f"{row.place}: {error}")
            continue
        for item in items:
            ids.add(_id_of(item), len(ids))
            if not problems:
                yield Located(row.place, item, row.number)
    for message in _repeated_ids(source, parse, ids):
        problems.add(message)
    problems.raise_if_any()
    if not len(ids):
        raise InputError(f"{source}: no examples; expected a JSON object with {needs} on each line")


def _hastily(source: Path, parse: Callable[[dict[str, Any], int], list[Parsed]]) -> Iterator[Parsed]:
    """Like `_read`, but the first row that cannot be used is an error at once, and ids are not compared."""
    for row in read_rows(source):
        try:
            items = _parsed(row, parse)
        except InputError as error:
            raise InputError(f"{row.place}: {error}") from error
        yield from items


def _parsed(row: Row, parse: Callable[[dict[str, Any], int], list[Parsed]]) -> list[Parsed]:
    items = parse(row.record(), row.number)
    if not isinstance(row.raw, bytes):  # lines were measured before they were parsed
        for item in items:
            size = len(item.prompt) + len(item.response) if isinstance(item, Example) else 0
            if size > MOST_LINE_BYTES:
                raise InputError(f"{size} characters, which is more than a million tokens; split it")
    return items


def _repeated_ids(source: Path, parse: Callable[[dict[str, Any], int], list[Parsed]], ids: Repeats) -> Iterator[str]:
    """A message for each id that was used before; reads the source again if there is one."""
    groups = ids.groups()
    if not groups:
        return
    wanted = {number for group in groups for number in group}
    found: dict[int, tuple[str, str]] = {}
    number = 0
    for row in read_rows(source):
        try:
            items = _parsed(row, parse)
        except InputError:
            continue
        for item in items:
            if number in wanted:
                found[number] = (row.place, _id_of(item))
            number += 1
    for first, *others in groups:
        where, identifier = found[first]
        for place, again in (found[other] for other in others):
            if again == identifier:
                yield f"{place}: id {identifier!r} is already used in {_in_same_file(where, place)}"


def _in_same_file(where: str, place: str) -> str:
    """`line 3` of `file:3`, if the other place is in the same file."""
    file, _, line = where.rpartition(":")
    if file != place.rpartition(":")[0]:
        return where
    return line.strip() if line.startswith(" ") else f"line {line}"


def _id_of(item: Any) -> str:
    identifier: str = item.id
    return identifier


def _ids(record: dict[str, Any], key: str, vocab_size: int) -> list[int]:
    tokens = record.get(key)
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
        raise InputError(f"`{key}` must be a list of one or more token ids")
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise InputError(f"`{key}` holds ids outside the vocabulary of {vocab_size} tokens")
    return tokens


class _LostTurns:
    """Notes the conversations of which something is not used as it was said, for one warning each."""

    def __init__(self, source: Path, data: DataSection) -> None:
        self.going_on = Names()
        """Ids of conversations that go on after the turns that are used."""
        self._source = source
        self._data = data
        self._roleless = Names()
        self._examples = 0

    def look_at(self, example: Example) -> None:
        """Notes an example whose prompt holds answers, under a template that cannot say who spoke."""
        self._examples += 1
        if self._data.template == CHAT_TEMPLATE:
            return
        if any(message["role"] == "assistant" for message in example.messages or ()):
            self._roleless.add(example.id)

    def warn(self) -> None:
        """Says what was noted."""
        if self.going_on.count:
            logger.warning(
                "%s: only %s of a conversation is used (--turns); %d of %d go on after it: %s",
                self._source,
                _TURN_NAMES[self._data.turns],
                self.going_on.count,
                self._examples,
                self.going_on,
            )
        if self._roleless.count:
            logger.warning(
                "%s: the template knows no turns, so earlier ones stand before the prompt without a word of who spoke, "
                "in %d of %d: %s; `--template chat` tells, `--turns first` leaves them out",
                self._source,
                self._roleless.count,
                self._examples,
                self._roleless,
            )
