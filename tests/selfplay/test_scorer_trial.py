"""A scorer is tried on one example before any stage starts, and nothing that it does reaches the driver."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tspin.config import Config
from megatron_tspin.errors import InputError
from megatron_tspin.selfplay.scorer_trial import try_scorer

pytestmark = pytest.mark.processes


def written(world: Path, *lines: str) -> None:
    (world / "scorer.py").write_text("\n".join(lines) + "\n")


def test_modules_beside_it_are_found_and_pythons_own_stay(world: Path, config_of: Callable[..., Config]) -> None:
    (world / "helper.py").write_text("import random\nSCORE = random.Random(1).random() * 0\n")
    (world / "random.py").write_text("raise RuntimeError('not this one')\n")
    written(
        world,
        "import numpy, os, sys",
        "from helper import SCORE",
        "def score(record, response):",
        "    print('x' * 70000)",  # more than a pipe holds
        "    record.clear()",
        "    return numpy.float32(1) + SCORE",
    )
    try_scorer(config_of())


def test_a_scorer_that_forks_comes_back_once(world: Path, config_of: Callable[..., Config]) -> None:
    written(
        world,
        "import os, time",
        "def score(record, response):",
        "    if os.fork() == 0:",  # and goes on, as a library's worker may
        "        return 2.0",
        "    os.wait()",
        "    if os.fork() == 0:",
        "        time.sleep(60)",  # left behind, with the output open
        "    return 1.0",
    )
    started = time.monotonic()
    try_scorer(config_of())
    assert time.monotonic() - started < 50


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["import absent_module", "def score(r, t): return 1"],
         "loading it failed at {file}:1: ModuleNotFoundError: No module named 'absent_module'"),
        (["def score(r, t):", "    return 1", "raise SystemExit(3)"], "loading it failed at {file}:3: SystemExit: 3"),
        (["def score(r, t):", "    return r['gold']"], "{file}:2: the scorer `score` failed for example 1: KeyError"),
        (["import os", "def score(r, t):", "    os._exit(7)"], "ended its process (exit code 7) when tried on one"),
        (["def score(r, t):", "    while True: pass"], "the scorer `score` took more than 0.5 s for example 1"),
        (["def score(r, t):", "    return sum(range(10 ** 13))"],
         "took more than 0.5 s for the first example, in a call that does not come back to Python ({file}:2)"),
        (["def score(r, t): return 10 ** 400"], "the scorer `score` returned 1000"),
        (["def score(r, t): return None"], "the scorer `score` returned None for example 1; it must return a number"),
    ],
    ids=["import", "exit", "error", "gone", "slow", "stuck", "huge", "none"],
)  # fmt: skip
def test_what_is_wrong_is_named(lines: list[str], message: str, world: Path, config_of: Callable[..., Config]) -> None:
    written(world, *lines)
    with pytest.raises(InputError) as caught:
        try_scorer(config_of(evaluation__scorer_seconds=0.5))
    assert message.format(file=world / "scorer.py") in str(caught.value)
