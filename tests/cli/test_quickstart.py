from pathlib import Path

import pytest

from megatron_tspin.cli import quickstart
from megatron_tspin.cli.main import main
from megatron_tspin.config import Config
from megatron_tspin.config_source import dump_config
from megatron_tspin.errors import InputError
from megatron_tspin.selfplay import driver
from tests.selfplay.fake_world import tree_of


@pytest.fixture
def example(world: Path) -> Path:
    """A checkout with `examples/quickstart`, whose paths are relative to the checkout."""
    folder = world / "examples" / "quickstart"
    folder.mkdir(parents=True)
    tree = tree_of(
        world, model__hf_checkpoint="base", data__annotated="train.jsonl", evaluation__scorer="scorer.py:score"
    )
    (folder / "run.yaml").write_text(dump_config(Config.model_validate(tree)))
    (folder / "tspin.yaml").write_text("objective.alpha: 0.5\noptimizer.lr: 1e-4\n")
    (folder / "sft.yaml").write_text("optimizer.lr: 2e-4\n")
    return folder


def test_a_method_is_the_example_with_its_overrides(example: Path, world: Path) -> None:
    config = quickstart.method_config(example, "tspin", Path("out"))
    assert config.objective.method == "tspin" and config.objective.alpha == 0.5 and config.optimizer.lr == 1e-4
    assert config.run_dir == str(Path("out/tspin").absolute())
    assert config.data.annotated == str(world / "train.jsonl")
    assert config.model.hf_checkpoint == str(world / "base")
    assert config.evaluation.scorer == f"{world / 'scorer.py'}:score"
    assert quickstart.method_config(example, "sft", Path("out")).optimizer.lr == 2e-4


def test_a_method_without_settings_is_refused(example: Path) -> None:
    with pytest.raises(InputError, match=r"spin\.yaml"):
        quickstart.method_config(example, "spin", Path("out"))


def test_without_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    assert main(["quickstart"]) == 2
    assert "checkout" in capsys.readouterr().err


def test_methods_run_one_after_the_other(
    example: Path, world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs: list[str] = []
    compared: list[list[Path]] = []
    monkeypatch.setattr(quickstart, "example_folder", lambda: example)
    monkeypatch.setattr(driver, "run", lambda config, on_iteration: runs.append(config.objective.method))
    monkeypatch.setattr(quickstart, "_compare", lambda run_dirs, output: compared.append([*run_dirs, output]))
    assert main(["quickstart", "--folder", str(tmp_path / "q"), "--methods", "tspin", "sft", "tspin"]) == 0
    assert runs == ["tspin", "sft"]
    assert compared == [[tmp_path / "q" / "tspin", tmp_path / "q" / "sft", tmp_path / "q" / "report.html"]]


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["quickstart", "--methods", "dpo"])
    assert caught.value.code == 2


def test_the_comparison_fits_into_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from megatron_tspin.report import headline, run_data

    names = ("tspin", "spin", "sft")
    lines = [
        headline.ComparedRun(name, f"{name}, lambda 0.1, lr 0.0001, 5e-05", "3 of 3", "45.0 ± 3.5", "76.0 ± 3.0",
                             "87.0 ± 2.4", "0.0577", "98 %", "+10.0 points (2.6 SE, clear)", "3 min 34 s")
        for name in names
    ]  # fmt: skip
    monkeypatch.setattr(run_data, "load_run", lambda run_dir: lines[0])
    monkeypatch.setattr(headline, "compare_runs", lambda first, others: lines)
    quickstart._print_table([Path(name) for name in names], Console(width=80))
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 80
    [sampled] = [line for line in shown if line.strip().startswith("accuracy (%), sampled")]
    assert sampled.count("76.0 ± 3.0") == 3
    [header] = [line for line in shown if line.split() == list(names)]
    assert not any("…" in line for line in shown), header
