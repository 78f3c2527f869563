"""The whole benchmark on a tiny checkpoint: plumbing only, no timing is judged."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import trl_side
from megatron_tspin.benchmark import step
from megatron_tspin.benchmark.settings import StepSettings
from megatron_tspin.benchmark.side_process import Repetition
from megatron_tspin.cli.main import main
from megatron_tspin.errors import EXIT_INPUT, EXIT_OK, EXIT_PARITY, EXIT_STAGE


def flags(checkpoint: Path, output: Path, *more: str) -> list[str]:
    fixed = [
        "--max-length",
        "48",
        "--triplets",
        "3",
        "--micro-batch-size",
        "2",
        "--threads",
        "1",
        "--output",
        str(output),
    ]
    for name, value in {"--row-capacity": "160", "--rounds": "2"}.items():
        fixed += [] if name in more else [name, value]
    return ["--model", str(checkpoint), *fixed, *more]


def bench(checkpoint: Path, output: Path, *more: str) -> int:
    return main(["bench", "step", *flags(checkpoint, output, *more)])


def written(folder: Path) -> Any:
    """The one result."""
    (path,) = folder.glob("step_tied_ultrachat_48_mb*.json")
    return json.loads(path.read_text())


@pytest.mark.processes
def test_sides_take_turns_and_the_result_is_written(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sides = ["transformers", "trl", "packed"]
    assert trl_side.main(flags(tiny_checkpoint("tied"), tmp_path, "--sides", *sides)) == EXIT_OK
    printed = capfd.readouterr()
    assert re.fullmatch(r"speedup over transformers: \d+\.\d\d", printed.out.splitlines()[-1])
    tree = written(tmp_path)
    measured = {side["name"]: side for side in tree["sides"] if side["seconds"]}
    assert [side["name"] for side in tree["sides"]] == ["transformers", "packed", "trl"]
    assert {"transformers", "packed"} <= set(measured)
    assert all(len(side["seconds"]) == 2 and len(side["peak_mib"]) == 3 for side in measured.values())
    theirs, ours = (measured[name]["sums"] for name in ("transformers", "packed"))
    assert ours == pytest.approx(theirs, rel=1e-4) and set(theirs) > {"loss", "log_prob_proto"}
    assert len(tree["matmul_flops_per_second"]) == 2
    rounds = re.findall(r"round (\d), (\w+):", printed.err)
    assert rounds == [(number, name) for number in "12" for name in measured]
    if "trl" not in measured:
        assert "trl is left out: TRL does not start: No module named" in printed.out


class FakeProcess:
    """Answers at once; how, the test says by side."""

    losses = {"transformers": 1.0, "padded": 1.0, "packed": 1.0}

    def __init__(self, name: str, settings: StepSettings, batch: object, make: object) -> None:
        self.name = name

    def __enter__(self) -> "FakeProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def loaded(self) -> object:
        if self.name == "padded":
            raise step.ChildError("RuntimeError: no such layout")
        return step_loaded

    def run(self) -> Repetition:
        return Repetition(0.5, 0.5, 1.0, {"loss": self.losses[self.name]})

    def matmul_rate(self) -> float:
        return 1e9


class step_loaded:
    held_mib, memory_method, versions = 1.0, "none", {"torch": "0"}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeProcess]:
    monkeypatch.setattr(step, "SideProcess", FakeProcess)
    monkeypatch.setattr(FakeProcess, "losses", dict(FakeProcess.losses))
    return FakeProcess


def test_disagreement_ends_the_run_with_both_values(
    fake: type[FakeProcess],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake.losses["packed"] = 1.2
    assert bench(tiny_checkpoint("tied"), tmp_path, "--sides", "transformers", "packed") == EXIT_PARITY
    assert "loss of the batch: transformers 1, packed 1.2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_side_that_fails_is_left_out_and_the_run_says_so(
    fake: type[FakeProcess],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sides = ["transformers", "padded", "packed"]
    assert bench(tiny_checkpoint("tied"), tmp_path, "--sides", *sides) == EXIT_STAGE
    printed = capsys.readouterr()
    assert "padded is left out: RuntimeError: no such layout" in printed.out
    assert printed.out.splitlines()[-1] == "speedup over transformers: 1.00"
    assert "padded: RuntimeError: no such layout" in printed.err


def test_rows_that_do_not_hold_a_triplet_are_refused_before_anything_is_loaded(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["--sides", "unshared", "--row-capacity", "64"]
    assert bench(tiny_checkpoint("tied"), tmp_path, *limits) == EXIT_INPUT
    assert re.search(r"--row-capacity 64 is less than a triplet's \d+ tokens", capsys.readouterr().err)


def test_time_runs_out_between_rounds(
    fake: type[FakeProcess], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    limits = ["--minutes", "0.0001", "--rounds", "9"]
    assert bench(tiny_checkpoint("tied"), tmp_path, "--sides", "packed", *limits) == EXIT_OK
    tree = written(tmp_path)
    assert len(tree["sides"][0]["seconds"]) == 1


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "step", "--help"])
    assert caught.value.code == 0
    assert "tspin bench step --quick" in capsys.readouterr().out
