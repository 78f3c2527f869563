"""Which parts of a conversation are prompts, and which their responses."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_tspin.config import Turns
from megatron_tspin.errors import InputError

Message = dict[str, str]

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """A response with all that was said before it."""

    history: list[Message]
    response: str
    """Empty where it is only asked for."""
    last_message: int
    """Index of the response among the messages, or of the question where there is none."""


def answered_turns(messages: list[Message], wanted: Turns) -> list[Turn]:
    """The wanted assistant messages that answer something, each with the messages before it.

    What an assistant says before the first user message, a greeting, answers nothing and is history.

    Args:
        messages: A conversation, as `checked_messages` returns it.
        wanted: The first, the last, or every one of them.

    Raises:
        InputError: There is none.
    """
    turns = _answers(messages)
    if not turns:
        if any(message["role"] == "assistant" for message in messages):
            raise InputError("`messages` has no user message before an assistant message")
        raise InputError("`messages` has no assistant message")
    return _chosen(turns, wanted)


def asked_turns(messages: list[Message], wanted: Turns) -> list[Turn]:
    """Like `answered_turns`, where a user message at the end is a turn too, which waits for its response.

    The responses that are there are left out, so that every command has the same prompts.

    Raises:
        InputError: Nothing is asked.
    """
    turns = [Turn(turn.history, "", turn.last_message) for turn in _answers(messages)]
    if messages and messages[-1]["role"] == "user":
        turns.append(Turn(messages, "", len(messages) - 1))
    if not turns:
        raise InputError("`messages` must end with the user message to answer, or with an answer to it")
    return _chosen(turns, wanted)


def _answers(messages: list[Message]) -> list[Turn]:
    first_user = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    return [
        Turn(messages[:index], message["content"], index)
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and index > first_user
    ]


def _chosen(turns: list[Turn], wanted: Turns) -> list[Turn]:
    return {"first": turns[:1], "last": turns[-1:], "every": turns}[wanted]


def opening(messages: list[Message]) -> str:
    """What a conversation begins with, up to its first user message: all of its turns have that in common."""
    first_user = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    return joined(messages[: first_user + 1])


def joined(messages: list[Message]) -> str:
    """The messages as one text, for templates that know no roles."""
    return "\n\n".join(message["content"] for message in messages)


def shown(value: Any) -> str:
    """A JSON value as an error message quotes it: its type and its first characters."""
    text = json.dumps(value, ensure_ascii=True)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def checked_text(value: Any, name: str) -> str:
    """The value, if it is a text with something in it.

    Args:
        value: Of a JSON object.
        name: What an error message calls it.

    Raises:
        InputError: It is no text, or nothing but white space.
    """
    if not isinstance(value, str):
        raise InputError(f"`{name}` must be a text, found {shown(value)}")
    if not value.strip():
        raise InputError(f"`{name}` is empty")
    return value


def checked_messages(messages: Any) -> list[Message]:
    """The messages of a conversation with nothing but role and content.

    Raises:
        InputError: They are none.
    """
    if not isinstance(messages, list):
        raise InputError(f"`messages` must be a list, found {shown(messages)}")
    return list(_checked(messages))


def _checked(messages: list[Any]) -> Iterator[Message]:
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if not isinstance(message, dict):
            raise InputError(f"`{place}` must be an object, found {shown(message)}")
        for key in ("role", "content"):
            if key not in message:
                raise InputError(f"`{place}.{key}` is missing")
        role = checked_text(message["role"], f"{place}.role")
        if role not in _ROLES:
            raise InputError(f"`{place}.role` is {role!r}; expected {', '.join(_ROLES)}")
        yield {"role": role, "content": checked_text(message["content"], f"{place}.content")}
