"""What people write is read alike by every command: lines, ids, errors, and which part of a conversation counts."""

import bz2
import gzip
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_tspin
from megatron_tspin.config import DataSection
from megatron_tspin.data.annotated import Example, read_examples, write_examples
from megatron_tspin.data.sources import MOST_LINE_BYTES, count_rows
from megatron_tspin.data.user_examples import (
    TokenIds,
    iterate_annotated,
    read_annotated,
    read_prompts,
    read_scored,
)
from megatron_tspin.errors import InputError

ROOT = Path(megatron_tspin.__file__).parents[1]
GOOD = b'{"prompt": "p", "response": "r"}'
READERS: dict[str, Callable[[Path], list[Any]]] = {
    "annotated": read_annotated,
    "prompts": read_prompts,
    "scored": lambda path: read_scored(path, 100),
}
every_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_prompt_and_response_lines_default_to_the_line_number_as_id(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, b"", b'{"id": 7, "prompt": "{x}", "response": "r", "gold": [1, null]}')
    first, second = read_annotated(path)
    assert (first.id, first.prompt, first.response, first.messages) == ("1", "p", "r", None)
    assert second.id == "7"
    assert second.record == {"id": 7, "prompt": "{x}", "response": "r", "gold": [1, None]}
    assert [located.place for located in iterate_annotated(path)] == [f"{path}:1", f"{path}:3"]
    assert count_rows(path) == 2


FIRST = DataSection(annotated="", turns="first")


def test_messages_give_the_first_turn_and_the_system_text_goes_first(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief.", "name": "x"},
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "More?"},
        {"role": "assistant", "content": "No."},
    ]
    # UltraChat repeats the prompt beside the messages.
    line = json.dumps({"messages": messages, "prompt": "Hi?"}).encode()
    (example,) = read_annotated(write(tmp_path / "a.jsonl", line), FIRST)
    assert example.prompt == "Be brief.\n\nHi?"
    assert example.response == "Hello."
    assert example.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]


@every_reader
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"response": "r"}', "`prompt` is missing; a line needs `prompt`"),
        (b'{"prompt": 3, "response": "r"}', "`prompt` must be a text, found int 3"),
        (b'{"prompt": " \\n", "response": "r"}', "`prompt` is empty"),
        (b'{"prompt": "p", "response": "r"', "not valid JSON"),
        (b'{"prompt": "p", "response": "r", "score": NaN}', "NaN is no JSON number"),
        (b'{"prompt": "p", "response": "r", "n": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"prompt": "\xff", "response": "r"}', "not valid UTF-8 at byte 12"),
        (b'{"prompt": "\\ud800", "response": "r"}', "surrogate"),
        (b'["p", "r"]', "expected a JSON object, found list"),
        (b'{"id": true, "prompt": "p", "response": "r"}', "`id` must be"),
        (b'{"id": "", "prompt": "p", "response": "r"}', "`id` must be"),
        (b'{"messages": "hi"}', "`messages` must be a list"),
        (b'{"messages": ["hi"]}', "`messages[0]` must be an object"),
        (b'{"messages": [{"role": "user", "content": ""}]}', "`messages[0].content` is empty"),
        (b'{"messages": [{"role": "user"}]}', "`messages[0].content` is missing"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "user message"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "'tool'"),
        (b'{"messages": [], "response": "r"}', "keep one of them"),
    ],
)
def test_a_bad_line_is_named_with_file_and_line(
    tmp_path: Path, read: Callable[[Path], list[Any]], line: bytes, expected: str
) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, line)
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))


@pytest.mark.parametrize("name", ["annotated", "scored"])
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"prompt": "p"}', "`response` is missing; a line needs `prompt` and `response`"),
        (b'{"prompt": "p", "response": null}', "`response` must be a text, found NoneType null"),
        (b'{"prompt": "p", "response": ""}', "`response` is empty"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "no assistant message"),
    ],
)
def test_a_response_is_needed_to_train_and_to_score(tmp_path: Path, name: str, line: bytes, expected: str) -> None:
    path = write(tmp_path / "a.jsonl", line)
    with pytest.raises(InputError, match=expected):
        READERS[name](path)


@every_reader
def test_duplicate_ids_are_refused_with_both_lines(tmp_path: Path, read: Callable[[Path], list[Any]]) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, b'{"id": "1", "prompt": "p", "response": "r"}')
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value) == f"{path}:2: id '1' is already used in line 1"


@every_reader
def test_all_errors_come_in_one_report_and_the_rest_is_counted(
    tmp_path: Path, read: Callable[[Path], list[Any]]
) -> None:
    path = write(tmp_path / "a.jsonl", *[b"{}"] * 25)
    with pytest.raises(InputError) as caught:
        read(path)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:20]] == [f"{path}:{n}" for n in range(1, 21)]
    assert lines[20:] == ["... and 5 more"]


@every_reader
def test_missing_and_empty_files_are_refused(tmp_path: Path, read: Callable[[Path], list[Any]]) -> None:
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no examples; expected a JSON object with `prompt`"):
        read(write(tmp_path / "a.jsonl", b" ", b""))


@every_reader
def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_read(
    tmp_path: Path, read: Callable[[Path], list[Any]]
) -> None:
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + GOOD + b"\r", b"\r", GOOD + b"\r")
    assert [(example.id, example.prompt) for example in read(path)] == [("1", "p"), ("3", "p")]


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes"},
]


@pytest.mark.parametrize(("length", "prompt_length"), [(2, 2), (3, 2), (4, 4), (5, 4)])
def test_the_last_user_message_is_answered_with_all_before_it(tmp_path: Path, length: int, prompt_length: int) -> None:
    (found,) = read_prompts(write(tmp_path / "a.jsonl", json.dumps({"messages": TALK[:length]}).encode()))
    assert found.messages == TALK[:prompt_length]
    # For a template that knows no roles.
    assert found.prompt == "\n\n".join(message["content"] for message in TALK[:prompt_length])


def test_a_system_message_alone_asks_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must end with the user message to answer"):
        read_prompts(write(tmp_path / "a.jsonl", json.dumps({"messages": TALK[:1]}).encode()))


def test_plain_prompts_need_no_response(tmp_path: Path) -> None:
    found = read_prompts(write(tmp_path / "a.jsonl", b'{"prompt": "x", "extra": [1]}', b'{"id": 7, "prompt": "y"}'))
    assert [(each.id, each.prompt, each.messages) for each in found] == [("1", "x", None), ("7", "y", None)]
    assert found[0].record == {"prompt": "x", "extra": [1]}


READERS_OF_DATA: dict[str, Callable[[Path, DataSection], list[Any]]] = {
    "annotated": read_annotated,
    "prompts": read_prompts,
    "scored": lambda path, data: read_scored(path, 100, data),
}
EXPECTED = {
    "first": [("a", 2, "4"), ("b", 2, "4")],
    "last": [("a", 2, "4"), ("b", 4, "Yes")],
    "every": [("a/1", 2, "4"), ("b/1", 2, "4"), ("b/2", 4, "Yes")],
}


@pytest.mark.parametrize("name", READERS_OF_DATA)
@pytest.mark.parametrize("turns", EXPECTED)
def test_every_command_takes_the_same_turns(tmp_path: Path, name: str, turns: Any) -> None:
    lines = [{"id": "a", "messages": TALK[:3]}, {"id": "b", "messages": TALK}]
    path = write(tmp_path / "a.jsonl", *(json.dumps(line).encode() for line in lines))
    found = READERS_OF_DATA[name](path, DataSection(annotated="", turns=turns))
    responses = {"prompts": lambda text: ""}.get(name, str)
    assert [(each.id, each.messages, each.response) for each in found] == [
        (identifier, TALK[:length], responses(text)) for identifier, length, text in EXPECTED[turns]
    ]
    assert all(each.record in lines for each in found)


@pytest.mark.parametrize("turns", ["last", "every"])
def test_a_greeting_is_history_and_no_answer(tmp_path: Path, turns: Any) -> None:
    talk = [{"role": "assistant", "content": "Welcome."}, *TALK[1:3]]
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": talk}).encode())
    (found,) = read_annotated(path, DataSection(annotated="", turns=turns))
    assert (found.messages, found.response) == (talk[:2], "4")


@pytest.mark.parametrize("name", ["annotated", "scored"])
def test_turns_that_are_left_out_are_counted(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    lines = [{"id": str(length), "messages": TALK[:length]} for length in (3, 4, 5)]
    path = write(tmp_path / "a.jsonl", GOOD, *(json.dumps(line).encode() for line in lines))
    with caplog.at_level(logging.WARNING):
        found = READERS_OF_DATA[name](path, FIRST)
    assert [each.response for each in found] == ["r", "4", "4", "4"]
    assert (
        f"{path}: only the first turn of a conversation is used (--turns); 2 of 4 go on after it: 4, 5" in caplog.text
    )
    caplog.clear()
    READERS_OF_DATA[name](write(path, GOOD, json.dumps(lines[0]).encode()), FIRST)
    assert not caplog.records


@pytest.mark.parametrize("name", READERS_OF_DATA)
def test_a_template_without_roles_is_warned_of(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, json.dumps({"id": "x", "messages": TALK}).encode())
    with caplog.at_level(logging.WARNING):
        READERS_OF_DATA[name](path, DataSection(annotated="", template="chat"))
        assert not caplog.records
        READERS_OF_DATA[name](path, DataSection(annotated=""))
    assert "the template knows no turns" in caplog.text and "in 1 of 2: x;" in caplog.text


def test_ids_and_text_to_score_in_one_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"id": 9, "prompt_ids": [5], "response_ids": [7, 99]}', GOOD)
    tokens, example = read_scored(path, 100)
    assert tokens == TokenIds("9", [5], [7, 99])
    assert isinstance(example, Example) and (example.id, example.response) == ("2", "r")


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
json_value = st.recursive(st.none() | st.booleans() | st.integers() | text, st.lists, max_leaves=4)


@settings(deadline=None)  # the machines of CI are shared
@given(st.lists(st.tuples(text, text, json_value), min_size=1, max_size=4))
def test_examples_survive_the_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]) -> None:
    path = tmp_path_factory.mktemp("x") / "train.jsonl"
    examples = [
        Example(id=str(n), prompt=prompt, response=response, record={"any": value})
        for n, (prompt, response, value) in enumerate(rows)
    ]
    write_examples(path, examples)
    assert read_examples(path) == examples


@pytest.mark.processes
def test_the_driver_imports_neither_torch_nor_transformers() -> None:
    modules = "annotated, user_examples, problems, indexed, role_documents, tokenizer"
    modules += ", tokenizer_loading, template, vocabulary, tokenization"
    code = (
        f"import sys; from megatron_tspin.data import {modules}; print({{'torch', 'transformers'}} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout == "set()\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"prompt": "x", "response": "' + b"a" * MOST_LINE_BYTES + b'"}\n',
            ":1: more than 4194304 bytes on one line",
        ),
        (
            b'{"prompt": "x", "response": "y"}\n{"prompt": "x", "resp',
            ":2: not valid JSON, and the file ends here without",
        ),
        ('{"prompt": "x"}\n'.encode("utf-16"), ": is UTF-16, but must be JSON Lines in UTF-8"),
        (gzip.compress(gzip.compress(b"{}")), ": is compressed twice (gzip), but must be"),
        (bz2.compress(b"{}"), ": is compressed (bzip2), but must be"),
        (b"[\n{}\n]\n", ": is a JSON list, but must be"),
        (
            b'{"prompt": "x", "response": "y", "prompt": "z"}\n',
            ":1: not valid JSON: the key `prompt` stands in one object",
        ),
    ],
    ids=["long", "torn", "utf-16", "gzip", "bzip2", "list", "twice"],
)
def test_files_that_are_something_else(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_annotated(path)
    assert f"{path}{message}" in str(caught.value)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in {
        tmp_path: "is not a file",
        tmp_path / "pipe": "is not a file",
        tmp_path / "x": "no such",
    }.items():
        with pytest.raises(InputError, match=f"{path}: {message}"):
            read_annotated(path)
        with pytest.raises(InputError, match=f"{path}: {message}"):
            count_rows(path)
