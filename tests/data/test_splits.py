"""Prompts that come twice, and what a share of the examples holds out."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tspin.config import Config, DataSection
from megatron_tspin.data.annotated import read_examples
from megatron_tspin.data.indexed import open_documents
from megatron_tspin.data.repeats import Repeats
from megatron_tspin.data.splits import splits_of
from megatron_tspin.data.tokenization import tokenize_run
from megatron_tspin.errors import InputError
from megatron_tspin.run_folder import HELD_OUT, TRAIN, RunFolder, document_stem, examples_path
from megatron_tspin.selfplay.preflight import _check_examples, _check_held_out

ConfigOf = Callable[..., Config]


@given(st.lists(st.sampled_from("abcdef"), max_size=12))
def test_repeats_are_what_comparing_all_would_find(texts: list[str]) -> None:
    repeats = Repeats()
    for number, text in enumerate(texts):
        repeats.add(text, 10 * number)
    by_text = {text: [10 * n for n, other in enumerate(texts) if other == text] for text in texts}
    assert repeats.groups() == sorted(group for group in by_text.values() if len(group) > 1)


def lines(count: int) -> list[dict[str, Any]]:
    return [{"id": f"x{number}", "prompt": f"question {number}", "response": "a"} for number in range(count)]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sides(path: Path, **settings: Any) -> dict[str, set[str]]:
    data = DataSection(annotated=str(path), **settings)
    return {name: {located.item.id for located in split()} for name, split in splits_of(data).items()}


def test_a_share_is_held_out_and_lines_that_are_added_move_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    before = sides(write(path, lines(500)), held_out_fraction=0.2)
    assert before[TRAIN] | before[HELD_OUT] == {line["id"] for line in lines(500)}
    assert not before[TRAIN] & before[HELD_OUT]
    assert 60 < len(before[HELD_OUT]) < 140
    after = sides(write(path, lines(900)[::-1]), held_out_fraction=0.2)
    assert before[TRAIN] < after[TRAIN] and before[HELD_OUT] < after[HELD_OUT]
    more = sides(path, held_out_fraction=0.4)
    assert after[HELD_OUT] < more[HELD_OUT]
    assert sides(path, held_out_fraction=0.2, split_seed=1)[HELD_OUT] != after[HELD_OUT]


def test_the_choice_is_the_same_on_every_machine(tmp_path: Path) -> None:
    assert sides(write(tmp_path / "a.jsonl", lines(20)), held_out_fraction=0.2)[HELD_OUT] == {
        f"x{n}" for n in (4, 9, 10, 11, 12, 13, 14, 18)
    }


def test_what_begins_alike_is_on_one_side(tmp_path: Path) -> None:
    talks = []
    for number in range(60):
        turns = [("user", f"q{number}"), ("assistant", "a"), ("user", "more"), ("assistant", "b")]
        messages = [{"role": role, "content": text} for role, text in turns]
        talks.append({"id": f"t{number}", "messages": messages})
        talks.append({"id": f"s{number}", "prompt": f" q{number}\n", "response": "again"})
    found = sides(write(tmp_path / "a.jsonl", talks), held_out_fraction=0.3, turns="every")
    for identifiers in found.values():
        numbers = {name[1:].partition("/")[0] for name in identifiers}
        assert identifiers == {name for n in numbers for name in (f"s{n}", f"t{n}/1", f"t{n}/2")}


def test_a_run_tokenizes_both_sides(config_of: ConfigOf) -> None:
    config = config_of(lines(40), held_out_fraction=0.25)
    _check_examples(config)
    _check_held_out(config)
    tokenize_run(config)
    folder = RunFolder(Path(config.run_dir)).data
    held = read_examples(examples_path(folder, HELD_OUT))
    assert 0 < len(held) < 20 and len(held) + len(read_examples(examples_path(folder, TRAIN))) == 40
    assert len(open_documents(document_stem(folder, HELD_OUT, "annotated"))) == len(held)


def test_a_share_that_leaves_nothing_is_refused(tmp_path: Path, config_of: ConfigOf) -> None:
    with pytest.raises(InputError, match="held_out_fraction = 0.01 leaves no example for held_out"):
        _check_held_out(config_of(lines(3), held_out_fraction=0.01))
    with pytest.raises(ValueError, match="two ways to hold examples out"):
        DataSection(annotated="a", held_out="b", held_out_fraction=0.1)


def test_prompts_that_come_twice_are_told_with_their_lines(
    config_of: ConfigOf, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_tspin"), "propagate", True)  # a command may have run before
    twice = [*lines(3), *lines(2), {"prompt": "question 1", "response": "another"}]
    for number, line in enumerate(twice):
        line["id"] = str(number)
    config = config_of(twice, lines(1))
    with caplog.at_level(logging.WARNING, logger="megatron_tspin"):
        tokenize_run(config)
    assert (
        f"train: 2 prompts of {config.data.annotated} come more than once, in 5 of 6 examples, 4 of which share the "
        "response too; the lines are 1 = 4, 2 = 5 = 6"
    ) in caplog.text
    assert "1 held-out prompts are also training prompts" in caplog.text
    caplog.clear()
    tokenize_run(config_of(twice, lines(1), held_out_fraction=0))
    assert "come more than once" not in caplog.text  # they are there already


def test_a_changed_column_tokenizes_again(config_of: ConfigOf) -> None:
    records = [{**line, "other": f"other {line['id']}"} for line in lines(3)]
    tokenize_run(config_of(records))
    config = config_of(records, response_column="other")
    tokenize_run(config)
    folder = RunFolder(Path(config.run_dir)).data
    assert [example.response for example in read_examples(examples_path(folder, TRAIN))][0] == "other x0"
