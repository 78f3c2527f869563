"""The user's scorer: found, or refused by name."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.errors import InputError
from megatron_tspin.generation.scorer import load_scorer, score_answer

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Verdict:
    score: float

NUMBER = 3

def judge(record, text):
    return Verdict(float(text == record["answer"])).score
"""


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    scorer = load_scorer(f"{tmp_path}/mine.py:judge")
    assert score_answer(scorer, {"answer": "4"}, "4", "a") == 1.0
    assert score_answer(scorer, {"answer": "4"}, "5", "a") == 0.0


def test_a_module() -> None:
    assert load_scorer("os.path:exists") is __import__("os").path.exists


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "evaluation.scorer = 'nothing': write it as path/to/file.py:function or module:function"),
        ("{folder}/absent.py:judge", "absent.py is not a file"),
        ("{folder}/mine.py:absent", "mine.py has no function `absent`"),
        ("{folder}/mine.py:NUMBER", "mine.py has no function `NUMBER`"),
        ("{folder}/mine.py:", "mine.py has no function ``"),
        ("no_such_module_at_all:judge", "evaluation.scorer = 'no_such_module_at_all:judge': No module named"),
        (":judge", "evaluation.scorer = ':judge': Empty module name"),
        (".relative:judge", "evaluation.scorer = '.relative:judge': "),
    ],
)
def test_refusals(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    with pytest.raises(InputError) as caught:
        load_scorer(name.format(folder=tmp_path))
    assert message in str(caught.value)


@pytest.mark.parametrize("score", [None, "1", -0.1, 1.1, float("nan")])
def test_scores_have_to_be_shares(score: Any) -> None:
    with pytest.raises(InputError, match=r"the scorer `<lambda>` returned .* for example q7; it must return a number"):
        score_answer(lambda record, text: score, {}, "", "q7")


def test_a_scorer_that_fails_is_named_with_its_line_and_the_example(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    with pytest.raises(InputError) as caught:
        score_answer(load_scorer(f"{tmp_path}/mine.py:judge"), {}, "4", "q7")
    assert str(caught.value) == f"{tmp_path}/mine.py:12: the scorer `judge` failed for example q7: KeyError: 'answer'"


@pytest.mark.parametrize("score", [True, 0, 1, 0.25])
def test_scores_become_numbers(score: Any) -> None:
    assert score_answer(lambda record, text: score, {}, "", "q7") == float(score)


def test_whatever_it_prints_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    def loud(record: Any, text: str) -> float:
        sys.stdout.write("from python\n")
        os.write(1, b"from os\n")
        ctypes.CDLL(None).puts(b"from C")
        return 1.0

    assert score_answer(loud, {}, "", "q7") == 1.0
    sys.stdout.write("after it\n")
    out, err = capfd.readouterr()
    assert out == "after it\n"
    assert sorted(err.splitlines()) == ["from C", "from os", "from python"]


@pytest.mark.processes
def test_a_call_that_does_not_come_back_ends_the_process() -> None:
    code = (
        "from megatron_tspin.generation.scorer import score_answer\n"
        "score_answer(lambda record, text: sum(range(10 ** 13)), {}, '', 'q7', 0.1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "in <lambda>" in done.stderr
