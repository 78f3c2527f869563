"""All that is wrong with an input, reported at once."""

from collections.abc import Sequence

from megatron_tspin.errors import InputError

_MOST_SHOWN = 20


class Names:
    """Counts names, and keeps the first twenty of any number."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.count = 0

    def add(self, name: str) -> None:
        """Notes one more."""
        self.count += 1
        if len(self.first) < _MOST_SHOWN:
            self.first.append(name)

    def __str__(self) -> str:
        """The first ones in one line, and how many more there are."""
        more = self.count - _MOST_SHOWN
        return ", ".join(self.first) + (f", ... and {more} more" if more > 0 else "")


class Problems:
    """Collects what is wrong and raises it as one error."""

    def __init__(self) -> None:
        self._messages = Names()

    def __bool__(self) -> bool:
        """Whether something was added."""
        return self._messages.count > 0

    def add(self, message: str) -> None:
        """Notes one problem; only the first twenty are shown, the rest is counted."""
        self._messages.add(message)

    def raise_if_any(self, remedy: str = "") -> None:
        """Raises what was collected.

        Args:
            remedy: What to do about it, appended as the last line.

        Raises:
            InputError: Something was added.
        """
        if not self:
            return
        lines = list(self._messages.first)
        if self._messages.count > _MOST_SHOWN:
            lines.append(f"... and {self._messages.count - _MOST_SHOWN} more")
        raise InputError("\n".join([*lines, remedy] if remedy else lines))


def listed(names: Sequence[str]) -> str:
    """The first twenty names in one line, and how many more there are."""
    shown = Names()
    for name in names:
        shown.add(name)
    return str(shown)
