"""`run_folder` is the only place that knows a run's paths, and finds again what it names."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_tspin
from megatron_tspin import run_folder
from megatron_tspin.run_folder import RunFolder

ROOT = Path(megatron_tspin.__file__).parent
OF_A_RUN = ("checkpoint", "conversion", "data", "generation", "objective", "report", "selfplay", "training")


def pattern_of(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def names() -> set[str]:
    """Every name in a path of a run, numbers as 0; those that are nothing but a number or a variable are left out."""
    folder, here = RunFolder(Path()), Path()
    paths = [
        folder.config, folder.data, folder.proto, folder.export, folder.report, folder.initial_checkpoint,
        folder.markers, folder.log("0"), folder.synthetic(0), folder.metrics(0), folder.tensorboard(0),
        folder.reference(0),
        folder.precision(0), folder.checkpoints(0), folder.evaluation(0), run_folder.shard_path(here, 0),
        run_folder.shard_settings(here), run_folder.shard_summary(here), run_folder.step_folder(here, 0),
        run_folder.held_out_answers(folder.evaluation(0), "0"), run_folder.examples_path(here, "train"),
        run_folder.examples_path(here, "held_out"),
    ]  # fmt: skip
    return {pattern_of(part) for path in paths for part in path.parts if not part.startswith("0")}


NAMES = names()


def text_of(node: ast.expr) -> str | None:
    """A string as it stands in the source, what is filled in as 0."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return pattern_of(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "0" for part in node.values)
    return None


def spelled_out(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of what is joined to a path, looked for in a folder, or taken off a name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            texts = [text_of(node.right)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            texts = [text_of(node.args[0])] if node.func.attr in ("glob", "removeprefix") else []
        else:
            continue
        yield from ((node.lineno, part) for text in texts if text for part in text.split("/"))


def known(name: str) -> bool:
    """Whether a run has this name, or names that begin as this one does before a `*` or its end."""
    return name in NAMES or any(each.startswith(name.partition("*")[0] + "0") for each in NAMES)


def test_no_other_module_spells_a_path_of_a_run() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for package in OF_A_RUN
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, name in spelled_out(path.read_text(encoding="utf-8"))
        if known(name)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line", ['a / "summary.json"', 'a / f"shard_{n:05d}.jsonl"', 'a.glob("step_*/x")', 'a.removeprefix("step_")']
)
def test_this_test_sees_paths(line: str) -> None:
    assert any(known(name) for _, name in spelled_out(line))


def test_what_is_there_is_found_in_order_and_nothing_else(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for number in (10, 2, 1000):
        run.iteration(number).mkdir()
        run.evaluation(number).parent.mkdir(exist_ok=True)
        run.evaluation(number).touch()
        run_folder.shard_path(tmp_path, number).touch()
        run_folder.step_folder(tmp_path, number).mkdir()
    for name in ("iteration_000.partial", "step_00000003.partial", "step_latest"):
        (tmp_path / name).mkdir()
    run_folder.held_out_answers(run.evaluation(2), "greedy").mkdir(parents=True)
    assert run.iterations() == [2, 10, 1000]
    assert run.evaluations() == [(number, run.evaluation(number)) for number in (2, 10, 1000)]
    assert run_folder.shard_paths(tmp_path) == [run_folder.shard_path(tmp_path, number) for number in (2, 10, 1000)]
    assert run_folder.step_folders(tmp_path) == [run_folder.step_folder(tmp_path, number) for number in (2, 10, 1000)]


def test_nothing_is_found_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "run").iterations() == []
    assert run_folder.step_folders(tmp_path / "run") == run_folder.shard_paths(tmp_path / "run") == []
