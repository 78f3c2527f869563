"""What `tspin score` reads: text or ids; bad lines are refused all at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.errors import InputError
from megatron_tspin.training.scoring_input import read_scoring_input
from tests.training.trajectory import make_config


def lines(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_text_and_ids_in_one_file(tiny_checkpoint: Any, tmp_path: Path) -> None:
    config = make_config(tiny_checkpoint("tied"), **{"data.template": "<{prompt}>"})
    data = lines(
        tmp_path / "d.jsonl",
        [
            {"prompt_ids": [5, 6], "response_ids": [7]},
            {"id": "named", "prompt": "a", "response": "bc"},
            {"id": 9, "prompt_ids": [5], "response_ids": [7, 100]},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<eos>"}]},
        ],
    )
    ids, pairs = read_scoring_input(config, data, 101)
    code = {character: 3 + ord(character) - 32 for character in "<a>bc"}
    prompt = [code["<"], code["a"], code[">"]]
    assert ids == ["1", "named", "9", "4"]
    assert pairs == [
        ([5, 6], [7]),
        (prompt, [code["b"], code["c"], 1]),
        ([5], [7, 100]),
        (prompt, [code["b"], 1]),  # as training has it: an EOS that is there is not doubled
    ]


def test_bad_lines_come_at_once(tiny_checkpoint: Any, tmp_path: Path) -> None:
    data = lines(
        tmp_path / "d.jsonl",
        [
            {"prompt": "a"},
            {"prompt_ids": [1], "response_ids": []},
            {"prompt_ids": [1], "response_ids": [101]},
            {"prompt_ids": [-1], "response_ids": [1]},
            {"prompt_ids": [True], "response_ids": [1]},
            {"prompt": "a", "response": "b"},
        ],
    )
    with pytest.raises(InputError) as caught:
        read_scoring_input(make_config(tiny_checkpoint("tied")), data, 101)
    assert str(caught.value).splitlines() == [
        f"{data}:1: `response` is missing; a line needs `prompt` and `response`, or `messages`, or `prompt_ids` and "
        "`response_ids` (it has `prompt`; --response-column names another)",
        f"{data}:2: `response_ids` must be a list of one or more token ids",
        f"{data}:3: `response_ids` holds ids outside the vocabulary of 101 tokens",
        f"{data}:4: `prompt_ids` holds ids outside the vocabulary of 101 tokens",
        f"{data}:5: `prompt_ids` must be a list of one or more token ids",
    ]


def test_an_empty_file(tiny_checkpoint: Any, tmp_path: Path) -> None:
    data = lines(tmp_path / "d.jsonl", [])
    with pytest.raises(InputError, match="no examples; expected"):
        read_scoring_input(make_config(tiny_checkpoint("tied")), data, 101)
