"""Where the parts of an example are, is said by settings; what is wrong with them, by the name that was given."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import DataSection
from megatron_tspin.data.annotated import Example
from megatron_tspin.data.user_examples import read_annotated, read_prompts, read_scored
from megatron_tspin.errors import InputError


def read(tmp_path: Path, record: dict[str, Any], **settings: Any) -> Example:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    data = DataSection(annotated="", **settings)
    (found,) = read_annotated(path, data)
    assert read_scored(path, 10, data) == [found]
    (asked,) = read_prompts(path, data)
    assert asked == found.model_copy(update={"response": ""})
    return found


def test_columns_have_the_names_that_were_given(tmp_path: Path) -> None:
    record = {"nr": 7, "question": "q", "answer": "a", "id": "not this"}
    found = read(tmp_path, record, prompt_column="question", response_column="answer", id_column="nr")
    assert (found.id, found.prompt, found.response, found.record) == ("7", "q", "a", record)


def test_paths_reach_into_objects_and_lists_and_whole_names_come_first(tmp_path: Path) -> None:
    record = {"in": {"q": "q"}, "out": [{"text": "bad"}, {"text": "good"}], "m.id": "whole", "m": {"id": "part"}}
    found = read(tmp_path, record, prompt_column="in.q", response_column="out.-1.text", id_column="m.id")
    assert (found.id, found.prompt, found.response) == ("whole", "q", "good")


@pytest.mark.parametrize(("value", "used"), [("Be brief.", True), ("", False), (None, False)])
def test_a_system_column_goes_in_front(tmp_path: Path, value: Any, used: bool) -> None:
    system = [{"role": "system", "content": value}] if used else []
    asked = {"role": "user", "content": "q"}
    found = read(tmp_path, {"system": value, "prompt": "q", "response": "a"})
    assert found.prompt == ("Be brief.\n\nq" if used else "q")
    assert found.messages == ([*system, asked] if used else None)
    talk = [asked, {"role": "assistant", "content": "a"}]
    assert read(tmp_path, {"sys": value, "chat": talk}, system_column="sys", messages_column="chat").messages == [
        *system,
        asked,
    ]


def test_a_system_text_may_stand_twice_but_not_differ(tmp_path: Path) -> None:
    talk = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    assert read(tmp_path, {"system": "system", "messages": talk}).messages == talk[:2]
    with pytest.raises(InputError, match="a system text in `system` and another one in `messages`"):
        read(tmp_path, {"system": "other", "messages": talk})
    assert read(tmp_path, {"system": "other", "messages": talk}, system_column=None).messages == talk[:2]


def test_messages_can_be_left_aside(tmp_path: Path) -> None:
    record = {"messages": [], "prompt": "q", "response": "a"}
    with pytest.raises(InputError, match="has both `response` and `messages`"):
        read(tmp_path, record)
    assert read(tmp_path, record, messages_column=None).response == "a"
    assert read(tmp_path, {**record, "messages": None}).response == "a"  # a null of a table


@pytest.mark.parametrize(
    ("record", "settings", "message"),
    [
        ({"q": "x", "response": "r"}, {},
         ":1: `prompt` is missing; a line needs `prompt` and `response`, or `messages` "
         "(it has `q`, `response`; --prompt-column names another)"),
        ({"q": "x", "a": 3}, {"prompt_column": "q", "response_column": "a"}, ":1: `a` must be a text, found int 3"),
        ({"q": ["x"]}, {"prompt_column": "q.1"}, ":1: `q.1` is missing; a line needs `q.1` and `response`"),
        ({"prompt": "x", "response": "r"}, {"id_column": "nr"}, ":1: `nr` is missing"),
        ({"prompt": "x", "response": "r", "system": 3}, {}, ":1: `system` must be a text, found int 3"),
        ({"chat": [{"role": "user"}]}, {"messages_column": "chat"}, ":1: `chat[0].content` is missing"),
        ({"chat": 3}, {"messages_column": "chat"}, ":1: `chat` must be a list, found int 3"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_the_users_names(
    tmp_path: Path, record: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, record, **settings)
    assert message in str(caught.value)
