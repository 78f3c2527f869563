import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.benchmark.agreement import check_agreement
from megatron_tspin.benchmark.figure import make_figure
from megatron_tspin.benchmark.output import print_result, write_result
from megatron_tspin.benchmark.results import SideResult, StepResult, read_result
from megatron_tspin.benchmark.settings import SIDES, StepSettings, settle
from megatron_tspin.errors import ArtifactError, InputError, ParityError
from megatron_tspin.models.architecture import Architecture, LayerFacts, Norm
from megatron_tspin.objective.packing import Shape

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def make_settings(**changes: Any) -> StepSettings:
    given: dict[str, Any] = {
        "model": "/somewhere/private/smol",
        "sides": ("transformers", "trl", "packed"),
        "lengths": "ultrachat",
        "max_length": 64,
        "triplets": 6,
        "micro_batch_size": 2,
        "row_capacity": 256,
        "rounds": 3,
        "threads": 1,
    }
    return StepSettings(**(given | changes))


def make_result() -> StepResult:
    return StepResult(
        settings=make_settings(),
        date="2030-01-02T03:04:05+00:00",
        machine={"cpu": "a <fast> one", "cores": 2},
        memory_method="a scale",
        prompt_tokens=[5] * 6,
        response_tokens=[[10, 10, 10]] * 6,
        useful_flops=2e9,
        matmul_flops_per_second=[4e9, 5e9],
        sides=[
            SideResult("transformers", 8e9, seconds=[6.0, 3.0, 4.0], peak_mib=[10.0, 30.0, 20.0]),
            SideResult("trl", 8e9, absent="No module named 'trl'"),
            SideResult("packed", 2e9, seconds=[1.0, 2.0, 1.5], peak_mib=[5.0]),
        ],
    )


def test_rates_are_medians_and_ranges() -> None:
    result = make_result()
    rate = result.triplets_per_second(result.sides[0])
    assert (rate.median, rate.low, rate.high) == (1.5, 1.0, 2.0)
    assert result.response_tokens_per_second(result.sides[0]) == 180 / 4
    assert result.speedup(result.sides[2]) == pytest.approx(4.0 / 1.5)
    assert result.predicted_speedup(result.sides[2]) == 4
    assert result.useful_share_of_peak(result.sides[2]) == pytest.approx(2 / 1.5 / 5)


def test_the_last_line_is_the_headline(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(make_result())
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "speedup over transformers: 2.67"
    assert "trl is left out: No module named 'trl'" in printed
    row = next(line for line in printed.splitlines() if line.strip().startswith("transformers"))
    assert {"1.5", "1..2", "45", "1.00", "30", "10%"} <= set(row.split())


@pytest.mark.parametrize("name", ["transformers", "packed"])
def test_no_headline_without_both_sides(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = make_result()
    next(side for side in result.sides if side.name == name).seconds.clear()
    print_result(result)
    assert result.headline() is None
    assert "speedup over transformers:" not in capsys.readouterr().out


def test_files_hold_every_repetition_and_no_path_of_the_machine(tmp_path: Path) -> None:
    target = write_result(make_result(), tmp_path / "results")
    assert target.name == "step_smol_ultrachat_64_mb2.json"
    tree = json.loads(target.read_text())
    assert tree["sides"][0]["seconds"] == [6.0, 3.0, 4.0]
    assert tree["sides"][0]["triplets_per_second"] == {"median": 1.5, "low": 1.0, "high": 2.0}
    assert tree["sides"][1]["absent"] == "No module named 'trl'" and "speedup" not in tree["sides"][1]
    assert tree["includes_optimizer"] is False
    assert tree == json.loads(json.dumps(make_result().as_json()))
    page = target.with_suffix(".html").read_text()
    assert "packed" in page and "<fast>" not in page
    assert "somewhere/private" not in target.read_text() + page


@pytest.mark.parametrize("path", sorted(RESULTS.glob("step_*.json")), ids=lambda path: path.stem)
def test_kept_results_can_be_read_and_plotted(path: Path) -> None:
    result, tree = read_result(path), json.loads(path.read_text())
    again = json.loads(json.dumps(result.as_json()))
    assert tree["settings"].pop("trl_path") is None
    assert again == tree
    drawn = json.loads(make_figure(result).to_json())["data"]
    assert drawn[0]["x"] == [side["name"] for side in tree["sides"] if side["seconds"]]


@pytest.mark.parametrize("text", ["[]", '{"benchmark": "profile"}', '{"benchmark": "triplet_step", "sides": 3}'])
def test_other_files_are_no_results(text: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"other\.json: not a result of `tspin bench step`"):
        read_result(tmp_path / "other.json")


def side(name: str, **sums: float) -> SideResult:
    return SideResult(name, 0.0, sums=sums)


def test_results_are_written_without_plotly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("megatron_tspin.benchmark.output.find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.delitem(sys.modules, "megatron_tspin.benchmark.figure", raising=False)
    target = write_result(make_result(), tmp_path)
    assert json.loads(target.read_text())["benchmark"] == "triplet_step"
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert "without a plot, as plotly is not installed" in caplog.text


def test_sides_that_agree_pass() -> None:
    check_agreement([side("packed", loss=1.00009), side("transformers", loss=1.0), side("trl", other=3.0)], bf16=False)
    check_agreement([side("packed", loss=1.005), side("transformers", loss=1.0)], bf16=True)
    check_agreement([], bf16=False)


@pytest.mark.parametrize("wrong", [1.00011, float("nan"), float("inf")])
def test_disagreement_names_both_values(wrong: float) -> None:
    sides = [side("packed", loss=wrong), side("transformers", loss=1.0), side("padded", loss=1.0)]
    with pytest.raises(ParityError, match=f"loss of the batch: transformers 1, packed {wrong:.9g}") as caught:
        check_agreement(sides, bf16=False)
    assert "padded" not in str(caught.value)


def make_architecture(positions: int) -> Architecture:
    sizes = {"vocab_size": 9, "hidden_size": 8, "ffn_hidden_size": 8, "num_heads": 1}
    return Architecture(
        family="llama",
        **sizes,
        num_kv_heads=1,
        head_dim=8,
        layers=(LayerFacts(),),
        norm=Norm("rms", 1e-5),
        ropes=(),
        softmax_scale=1.0,
        tied_embeddings=True,
        max_positions=positions,
        folder=Path("somewhere"),
    )


def settled(quick: bool = False, positions: int = 4096, **given: Any) -> StepSettings:
    return settle({"lengths": "ultrachat", "threads": 1, **given}, quick, make_architecture(positions))


def test_defaults_depend_on_quick_and_fit_the_policy() -> None:
    full, quick = settled(), settled(quick=True, triplets=None)
    assert (full.max_length, full.sides, full.minutes) == (2048, tuple(SIDES), None)
    assert (quick.max_length, quick.sides) == (384, ("transformers", "padded", "unshared", "packed"))
    assert quick.minutes is not None and quick.minutes < 10 and quick.triplets < full.triplets
    assert settled(positions=128).max_length == 128
    assert settled(quick=True, triplets=7, sides=["packed", "trl", "recipe"]).sides == ("recipe", "packed", "trl")
    with pytest.raises(InputError, match="--max-length 256 is more than the 128 positions"):
        settled(max_length=256, positions=128)


@pytest.mark.parametrize("given", [{}, {"quick": True}, {"micro_batch_size": 1}])
def test_rows_hold_any_triplet_by_default(given: dict[str, Any]) -> None:
    settings = settled(**given)
    longest = Shape(1, (settings.max_length - 1,) * 3)
    assert longest.row_tokens(share_prompts=False) <= settings.row_capacity
