"""A row of prompts holds each of them, and what they share once."""

import random

import pytest

from megatron_tspin.models.prompt_row import prompt_row

LONG = list(range(100, 140))
CASES = {
    "none": [],
    "one": [[1, 2, 3]],
    "nothing in common": [[1, 2], [3, 4]],
    "equal": [LONG, LONG, LONG],
    "one begins another": [LONG, LONG[:20], LONG + [1]],
    "too little in common": [[1, *range(9, 90)], [1, *range(90, 200)]],
    "template": [[*LONG, *rest, 7] for rest in ([1], [2, 3], [1, 4], [1], [])],
}


@pytest.mark.parametrize("name", CASES)
def test_each_prompt_is_in_the_row(name: str) -> None:
    check(CASES[name])


def test_any_prompts() -> None:
    chance = random.Random(3)
    for _ in range(200):
        front = [chance.randint(0, 1) for _ in range(chance.randint(0, 20))]
        check([front + [chance.randint(0, 1) for _ in range(chance.randint(1, 5))] for _ in range(5)])


def check(prompts: list[list[int]]) -> None:
    ids, row = prompt_row(prompts)
    assert len(ids) == row.tokens == row.layout.length == len(row.positions)
    assert [ids[places].tolist() for places in row.places] == prompts
    assert [row.positions[places].tolist() for places in row.places] == [list(range(len(each))) for each in prompts]
    assert row.tokens <= sum(map(len, set(map(tuple, prompts))))


def test_what_is_shared() -> None:
    assert prompt_row(CASES["equal"])[1].tokens == len(LONG)
    assert prompt_row(CASES["one begins another"])[1].shared == 19, "each prompt has a token of its own"
    assert prompt_row(CASES["too little in common"])[1].shared == 0
    assert prompt_row(CASES["template"], share=False)[1].shared == 0
    row = prompt_row(CASES["template"])[1]
    assert (row.shared, row.rests, row.rest_of) == (len(LONG), (2, 3, 3, 1), (0, 1, 2, 0, 3))
