"""Where sampled answers stop beside EOS."""

from typing import Any

import pytest

from megatron_tspin.data.endings import Endings
from megatron_tspin.data.stops import stops_of_run


class Letters:
    """Token 2 + i is the i-th of some texts; <end> is special."""

    texts = ("<eos>", "<end>", "a", "b", "\n", "\n\n", "#", "a#")
    special_ids = frozenset({0, 1})
    endings = Endings(0, frozenset({0}))

    def token_id(self, text: str) -> int | None:
        return self.texts.index(text) if text in self.texts else None

    def decode(self, ids: Any) -> str:
        return "".join(self.texts[token] for token in ids)


@pytest.mark.parametrize(
    ("stop", "answer"),
    [
        ([], [2, 3, 1, 7, 5, 0]),
        (["3"], [2, 2, 3]),
        (["<end>"], [2, 3, 1]),
        (["\n"], [2, 3, 5]),
        (["a#b"], [2, 2, 6, 2, 7, 3]),
        (["\n\n", "ab"], [3, 2, 3]),
        (["#" * 3], [6, 7, 6, 6]),
    ],
)
def test_the_first_stop_ends_an_answer(stop: list[str], answer: list[int]) -> None:
    stops = stops_of_run(stop, Letters())
    assert [stops.end(answer[: count + 1]) for count in range(len(answer))] == [False] * (len(answer) - 1) + [True]


def test_a_long_text_far_into_an_answer() -> None:
    stops = stops_of_run(["ab" * 20], Letters())
    answer = [2] * 500 + [2, 3] * 20
    assert stops.end(answer) and not stops.end(answer[:-1])
