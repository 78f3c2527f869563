"""The prompts of `tspin generate` are those that training would take from the same lines."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.data.annotated import read_annotated
from megatron_tspin.errors import InputError
from megatron_tspin.generation.stages import _read_prompts


def lines(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def talk(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


SYSTEM, USER, ANSWER, MORE = ("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "Sure?")


def test_conversations_are_cut_where_training_cuts_them(tmp_path: Path) -> None:
    whole = lines(tmp_path / "a.jsonl", [talk(SYSTEM, USER, ANSWER, MORE, ("assistant", "Yes")), talk(USER, ANSWER)])
    found = _read_prompts(whole)
    expected = read_annotated(whole)
    assert [(e.id, e.prompt, e.messages) for e in found] == [(e.id, e.prompt, e.messages) for e in expected]


def test_conversations_may_end_before_the_answer(tmp_path: Path) -> None:
    (found,) = _read_prompts(lines(tmp_path / "a.jsonl", [talk(SYSTEM, USER)]))
    assert found.prompt == "Be brief.\n\n2+2?" and found.messages is not None and len(found.messages) == 2


def test_plain_prompts(tmp_path: Path) -> None:
    found = _read_prompts(lines(tmp_path / "a.jsonl", [{"prompt": "x", "extra": [1]}, {"id": 7, "prompt": "y"}]))
    assert [(each.id, each.prompt, each.messages) for each in found] == [("1", "x", None), ("7", "y", None)]
    assert found[0].record == {"prompt": "x", "extra": [1]}


def test_bad_lines_come_at_once(tmp_path: Path) -> None:
    values = [{}, {"prompt": 3}, {"messages": ["x"]}, {"messages": [{"role": "user"}]}, talk(ANSWER), {"prompt": ""}]
    path = lines(tmp_path / "a.jsonl", [*values, {"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}])
    with pytest.raises(InputError) as caught:
        _read_prompts(path)
    needs = "needs `prompt` as text, or `messages` with `role` and `content`"
    assert str(caught.value).splitlines() == [
        *(f"{path}:{number}: {needs}" for number in range(1, 7)),
        f"{path}:8: the id 'a' is that of line 7 too",
    ]


def test_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no prompts"):
        _read_prompts(lines(tmp_path / "a.jsonl", []))
