"""Scores of held-out answers, and what a role's responses look like as a whole."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tspin.data.annotated import Example
from megatron_tspin.data.endings import Endings
from megatron_tspin.generation.evaluation import decoding_result
from megatron_tspin.generation.stages import summarise
from megatron_tspin.records import Response


def examples(count: int) -> list[Example]:
    return [Example(id=str(i), prompt="p", response="r", record={"wanted": str(i)}) for i in range(count)]


def response(i: int, text: str, ended: bool = True, ids: list[int] | None = None) -> Response:
    ids = [5, 1] if ids is None else ids
    return Response(
        id=str(i),
        response_ids=ids,
        token_log_probs=[-0.5] * len(ids),
        ended=ended,
        ended_by=ids[-1] if ended else None,
        text=text,
    )


TOKENIZER: Any = SimpleNamespace(
    special_ids=frozenset([0, 1, 3]), endings=Endings(1, frozenset([1])), token_text=lambda token: f"<{token}>"
)


def scorer(record: Any, text: str) -> float:
    return float(text == record["wanted"])


def test_an_answer_that_did_not_end_is_wrong() -> None:
    answers = [response(0, "0"), response(1, "1", ended=False), response(2, "no"), response(3, "3", ids=[1])]
    found = decoding_result(examples(4), answers, scorer)
    assert (found.num_prompts, found.accuracy, found.ended_share, found.mean_tokens) == (4, 0.5, 0.75, 1.75)
    assert found.standard_error == pytest.approx(math.sqrt((4 * 0.25) / 3 / 4))


def test_an_answer_that_did_not_end_is_not_shown_to_the_scorer() -> None:
    def refuse(record: Any, text: str) -> float:
        raise AssertionError(text)

    assert decoding_result(examples(1), [response(0, "0", ended=False)], refuse).accuracy == 0.0


def test_without_a_scorer() -> None:
    found = decoding_result(examples(2), [response(0, "0"), response(1, "x", ended=False)], None)
    assert found.accuracy is None and found.standard_error is None and found.ended_share == 0.5


def test_one_answer_has_no_standard_error() -> None:
    found = decoding_result(examples(1), [response(0, "0")], scorer)
    assert found.accuracy == 1.0 and found.standard_error is None


@given(st.lists(st.booleans(), min_size=2, max_size=50))
def test_the_standard_error_is_that_of_a_share(right: list[bool]) -> None:
    answers = [response(i, str(i) if each else "no") for i, each in enumerate(right)]
    found = decoding_result(examples(len(right)), answers, scorer)
    share, count = sum(right) / len(right), len(right)
    assert found.accuracy == pytest.approx(share)
    assert found.standard_error == pytest.approx(math.sqrt(share * (1 - share) / (count - 1)), abs=1e-12)


def test_answers_have_to_match_the_examples() -> None:
    with pytest.raises(ValueError, match="shorter"):
        decoding_result(examples(2), [response(0, "0")], scorer)


def test_summary() -> None:
    annotated: Any = [[5, 1], [6, 1], [7, 1], [8, 1]]
    answers = [
        response(0, "", ids=[5, 1]),
        response(1, "", ids=[1]),
        response(2, "", ids=[7, 1, 2], ended=False),
        response(3, "", ids=[8, 1]),
    ]
    found = summarise(answers, TOKENIZER, annotated)
    assert found.model_dump() == {
        "num_responses": 4,
        "ended_share": 0.75,
        "empty_share": 0.25,
        "identical_share": 0.5,
        "mean_tokens": 2.0,
        "mean_log_prob": -1.0,
        "endings": {"<1>": 3},
        "passed_over": None,
    }


def test_a_special_token_that_endless_answers_go_on_after_is_named() -> None:
    annotated: Any = [[5, 1]] * 4
    endless = [response(number, "", ids=[5, 3, 6], ended=False) for number in range(2)]
    found = summarise([*endless, response(2, "", ids=[2, 3, 1])], TOKENIZER, annotated)
    assert (found.passed_over, found.endings) == ("<3>", {"<1>": 1})
    others = [response(number, "", ids=[5, number, 6], ended=False) for number in (7, 8)]
    assert summarise([endless[0], *others], TOKENIZER, annotated).passed_over is None
