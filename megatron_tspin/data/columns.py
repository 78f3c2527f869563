"""Where in a row the parts of an example are: `data.*_column`, each the name of a column or a path into nested ones."""

import re
from typing import Any

from megatron_tspin.config import DataSection
from megatron_tspin.data.turns import Message, checked_messages, checked_text, shown
from megatron_tspin.errors import InputError

_ABSENT = object()
_INDEX = re.compile(r"-?\d+")
_DEFAULT_ID_COLUMN = DataSection.model_fields["id_column"].default
_MOST_NAMED = 12


class Columns:
    """Reads the parts of examples out of rows.

    Args:
        data: Names the columns.
        needs: What a row must have, for error messages.
    """

    def __init__(self, data: DataSection, needs: str) -> None:
        self._data = data
        self._needs = needs

    def identifier(self, record: dict[str, Any], number: int) -> str:
        """The row's id; its number where it has none and nobody said which column holds it.

        Raises:
            InputError: It is missing, empty, or neither a text nor a whole number.
        """
        column = self._data.id_column
        value = _found(record, column)
        if value is _ABSENT and column == _DEFAULT_ID_COLUMN:
            return str(number)
        if value is _ABSENT:
            raise self._missing(record, column, "--id-column")
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise InputError(f"`{column}` must be a non-empty text or a whole number, found {shown(value)}")
        return str(value)

    def messages(self, record: dict[str, Any]) -> list[Message] | None:
        """The conversation, with the system column's text in front; None if the row has none.

        Raises:
            InputError: It is malformed, or there is a second response or system text beside it.
        """
        column = self._data.messages_column
        value = _ABSENT if column is None else _found(record, column)
        if value is _ABSENT or value is None:  # Parquet has a null where a row lacks a column
            return None
        if _found(record, self._data.response_column) not in (_ABSENT, None):
            raise InputError(
                f"has both `{self._data.response_column}` and `{column}`; keep one of them, or set "
                "data.messages_column to null, or --response-column to another"
            )
        try:
            messages = checked_messages(value)
        except InputError as error:
            raise InputError(str(error).replace("`messages", f"`{column}", 1)) from error
        system = self._system(record)
        if system is None:
            return messages
        if messages and messages[0]["role"] == "system":
            if messages[0]["content"] == system:
                return messages
            raise InputError(
                f"has a system text in `{self._data.system_column}` and another one in `{column}`; keep one of them, "
                "or set data.system_column to null"
            )
        return [{"role": "system", "content": system}, *messages]

    def question(self, record: dict[str, Any]) -> tuple[str, list[Message] | None]:
        """The prompt as one text, and as messages if there is a system text.

        Raises:
            InputError: It is missing, no text, or empty.
        """
        prompt = self._text(record, self._data.prompt_column, "--prompt-column")
        system = self._system(record)
        if system is None:
            return prompt, None
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        return f"{system}\n\n{prompt}", messages

    def response(self, record: dict[str, Any]) -> str:
        """The annotated response.

        Raises:
            InputError: It is missing, no text, or empty.
        """
        return self._text(record, self._data.response_column, "--response-column")

    def _system(self, record: dict[str, Any]) -> str | None:
        column = self._data.system_column
        value = None if column is None else _found(record, column)
        if value is _ABSENT or value is None or value == "":
            return None
        return checked_text(value, str(column))

    def _text(self, record: dict[str, Any], column: str, flag: str) -> str:
        value = _found(record, column)
        if value is _ABSENT:
            raise self._missing(record, column, flag)
        return checked_text(value, column)

    def _missing(self, record: dict[str, Any], column: str, flag: str) -> InputError:
        names = [f"`{name}`" for name in record]
        there = ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
        other = f" (it has {there}; {flag} names another)" if names else ""
        return InputError(f"`{column}` is missing; a line needs {self._needs}{other}")


def _found(record: dict[str, Any], path: str) -> Any:
    """What lies at a path such as `answers.0.text`; a column that has dots in its own name comes first."""
    if path in record:
        return record[path]
    value: Any = record
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and _INDEX.fullmatch(part) and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            return _ABSENT
    return value
