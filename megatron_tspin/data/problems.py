"""All that is wrong with an input, reported at once."""

from collections.abc import Sequence

from megatron_tspin.errors import InputError

_MOST_SHOWN = 20


class Problems:
    """Collects what is wrong and raises it as one error."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    def add(self, message: str) -> None:
        """Notes one problem; only the first twenty are shown, the rest is counted."""
        self._messages.append(message)

    def raise_if_any(self, remedy: str = "") -> None:
        """Raises what was collected.

        Args:
            remedy: What to do about it, appended as the last line.

        Raises:
            InputError: Something was added.
        """
        if not self._messages:
            return
        lines = self._messages[:_MOST_SHOWN]
        if len(self._messages) > _MOST_SHOWN:
            lines.append(f"... and {len(self._messages) - _MOST_SHOWN} more")
        raise InputError("\n".join([*lines, remedy] if remedy else lines))


def listed(names: Sequence[str]) -> str:
    """The first twenty names in one line, and how many more there are."""
    more = len(names) - _MOST_SHOWN
    return ", ".join(names[:_MOST_SHOWN]) + (f", ... and {more} more" if more > 0 else "")
