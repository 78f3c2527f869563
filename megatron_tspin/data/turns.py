"""Which part of a conversation is the prompt, and which the response."""

import json
from collections.abc import Iterator
from typing import Any

from megatron_tspin.errors import InputError

Message = dict[str, str]

_ROLES = ("system", "user", "assistant")


def first_turn(messages: Any) -> tuple[list[Message], str]:
    """The messages before the first assistant message, and that message's text; what follows is not looked at.

    Raises:
        InputError: These are no messages, or there is no user message with an answer.
    """
    before: list[Message] = []
    for message in _checked(messages):
        if message["role"] == "assistant":
            if not any(earlier["role"] == "user" for earlier in before):
                raise InputError("`messages` has no user message before the first assistant message")
            return before, message["content"]
        before.append(message)
    raise InputError("`messages` has no assistant message")


def last_user_turn(messages: Any) -> list[Message]:
    """All messages up to the last user message, the answers before it included; an answer to it is left out.

    Raises:
        InputError: These are no messages, or they end with neither a user message nor the answer to one.
    """
    found = list(_checked(messages))
    while found and found[-1]["role"] == "assistant":
        found.pop()
    if not found or found[-1]["role"] != "user":
        raise InputError("`messages` must end with the user message to answer, or with an answer to it")
    return found


def without_earlier_turns(messages: list[Message]) -> list[Message]:
    """What a template that knows no roles can say of a conversation: its system messages and its last user message."""
    return [message for message in messages[:-1] if message["role"] == "system"] + messages[-1:]


def joined(messages: list[Message]) -> str:
    """The messages as one text, for templates that know no roles."""
    return "\n\n".join(message["content"] for message in messages)


def text_of(record: dict[str, Any], key: str, place: str = "", hint: str = "") -> str:
    """A text of a JSON object that must be there.

    Args:
        record: The object.
        key: Where the text is.
        place: What stands before the key in an error message.
        hint: What an error message says where the key is missing.

    Raises:
        InputError: It is missing, no text, or nothing but white space.
    """
    name = f"`{place}{key}`"
    if key not in record:
        raise InputError(f"{name} is missing{hint}")
    value = record[key]
    if not isinstance(value, str):
        raise InputError(f"{name} must be a text, found {shown(value)}")
    if not value.strip():
        raise InputError(f"{name} is empty")
    return value


def shown(value: Any) -> str:
    """A JSON value as an error message quotes it: its type and its first characters."""
    text = json.dumps(value, ensure_ascii=True)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _checked(messages: Any) -> Iterator[Message]:
    if not isinstance(messages, list):
        raise InputError(f"`messages` must be a list, found {shown(messages)}")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InputError(f"`messages[{index}]` must be an object, found {shown(message)}")
        role = text_of(message, "role", f"messages[{index}].")
        if role not in _ROLES:
            raise InputError(f"`messages[{index}].role` is {role!r}; expected {', '.join(_ROLES)}")
        yield {"role": role, "content": text_of(message, "content", f"messages[{index}].")}
