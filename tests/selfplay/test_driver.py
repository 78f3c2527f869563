import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.cli.ranks import only_writer
from megatron_tspin.config import Config
from megatron_tspin.config_source import load_config
from megatron_tspin.errors import (
    EXIT_DIVERGED,
    EXIT_INPUT,
    EXIT_PARITY,
    EXIT_STAGE,
    EXIT_STOPPED,
    InputError,
    StageError,
    TspinError,
)
from megatron_tspin.selfplay import driver
from megatron_tspin.selfplay.plan import plan
from megatron_tspin.selfplay.run_config import result_digest
from megatron_tspin.storage import sha256_file
from tests.selfplay.fake_world import FakeRun, tree_of, write_world

pytestmark = pytest.mark.processes

NAMES = [
    "tokenize",
    "convert",
    "rollout_000",
    "train_000",
    "rollout_001",
    "train_001",
    "rollout_002",
    "export",
    "report",
]


def test_a_run_does_every_stage_once(fake: FakeRun) -> None:
    assert fake.go() == 0
    assert fake.take_started() == NAMES
    assert fake.tables == 3
    assert fake.go() == 0
    assert fake.take_started() == []


def test_markers_hold_what_went_in_and_out(fake: FakeRun) -> None:
    fake.go()
    marker = json.loads((fake.run_dir / "stages" / "train_001.json").read_text())
    assert list(marker) == [
        "stage", "command", "config", "execution", "inputs", "outputs", "released", "started", "seconds", "versions",
        "place",
    ]  # fmt: skip
    assert marker["config"] == result_digest(fake.config)
    assert marker["execution"]["training.micro_batch_size"] == 4 and "optimizer.lr" not in marker["execution"]
    before = "iteration_000/checkpoint/step_00000004/manifest.json"
    assert marker["inputs"][before] == sha256_file(fake.run_dir / before)
    assert "iteration_001/checkpoint/step_00000004/manifest.json" in marker["outputs"]
    assert {"python", "megatron_tspin", "torch"} <= set(marker["versions"])
    rollout = json.loads((fake.run_dir / "stages" / "rollout_000.json").read_text())
    assert rollout["inputs"][str(fake.world / "scorer.py")] == sha256_file(fake.world / "scorer.py")
    assert {"proto/summary.json", "iteration_000/synthetic/summary.json"} <= set(rollout["outputs"])


@pytest.mark.parametrize(
    ("behaviour", "code", "words"),
    [
        ("fail1", EXIT_STAGE, "exit code 1"),
        ("fail2", EXIT_INPUT, "exit code 2"),
        ("fail4", EXIT_PARITY, "exit code 4"),
        ("fail5", EXIT_DIVERGED, "exit code 5"),
        ("refuse5", EXIT_DIVERGED, "line 3 is wrong"),
        ("refuse1", EXIT_STAGE, "line 3 is wrong"),
        ("forget", EXIT_STAGE, "iteration_000/metrics.jsonl"),
    ],
)
def test_a_failed_stage_is_named_and_the_same_command_continues(
    fake: FakeRun, behaviour: str, code: int, words: str
) -> None:
    fake.behave(train_000=behaviour)
    with pytest.raises(StageError) as caught:
        fake.go()
    assert caught.value.exit_code == code
    message = str(caught.value)
    assert "train_000" in message and words in message and str(fake.run_dir / "logs" / "train_000.log") in message
    assert "same command" in message or behaviour == "forget"
    assert fake.take_started() == NAMES[:4]
    fake.behave()
    assert fake.go() == 0
    assert fake.take_started() == NAMES[3:]


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [("fail1", EXIT_STOPPED), ("kill15", EXIT_STOPPED), ("refuse2", EXIT_INPUT), ("refuse75", EXIT_STOPPED)],
)
def test_a_request_to_stop_hides_no_reason_of_a_stage(
    behaviour: str, code: int, fake: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = driver.launch.run_process

    def asked_meanwhile(*arguments: Any) -> int:
        ended = real(*arguments)
        monkeypatch.setattr(driver, "stop_requested", lambda: "SIGUSR1")
        return ended

    monkeypatch.setattr(driver.launch, "run_process", asked_meanwhile)
    fake.behave(tokenize=behaviour)
    with pytest.raises(TspinError) as caught:
        fake.go()
    assert caught.value.exit_code == code


def test_an_old_failure_is_not_taken_for_a_new_one(fake: FakeRun) -> None:
    for behaviour, code in (("refuse5", EXIT_DIVERGED), ("fail1", EXIT_STAGE)):
        fake.behave(convert=behaviour)
        with pytest.raises(StageError) as caught:
            fake.go()
        assert caught.value.exit_code == code


def test_a_stage_whose_input_changes_while_it_runs_is_not_done(fake: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def changing(*args: object) -> int:
        (fake.world / "train.jsonl").write_text("changed")
        return run_process(*args)  # type: ignore[arg-type]

    run_process = driver.launch.run_process
    monkeypatch.setattr(driver.launch, "run_process", changing)
    with pytest.raises(StageError, match="changed while it ran"):
        fake.go()
    assert not (fake.run_dir / "stages" / "tokenize.json").exists()


CHANGES = [
    ("data/train_prompt_document.json", "tokenize"),
    ("initial/checkpoint/manifest.json", "convert"),
    ("iteration_000/synthetic/summary.json", "rollout_000"),
    ("proto/summary.json", "rollout_000"),
    ("evaluation/policy_001.json", "rollout_001"),
    ("iteration_001/metrics.jsonl", "train_001"),
    ("iteration_001/checkpoint/step_00000004/manifest.json", "train_001"),
    ("export/hf/config.json", "export"),
    ("../train.jsonl", "tokenize"),
    ("../base/model.safetensors", "tokenize"),
    ("../scorer.py", "rollout_000"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    """A finished run; whoever changes a file of it puts it back."""
    world = write_world(tmp_path_factory.mktemp("finished"))
    fake = FakeRun(world, Config.model_validate(tree_of(world)))
    fake.go()
    fake.take_started()
    return fake


@pytest.mark.parametrize(("path", "stage"), CHANGES)
def test_a_changed_file_is_refused_with_both_digests(finished: FakeRun, path: str, stage: str) -> None:
    file = (finished.run_dir / path).resolve()
    old, before = file.read_bytes(), sha256_file(file)
    file.write_bytes(old + b" ")
    with pytest.raises(InputError) as caught:
        finished.go()
    message = str(caught.value)
    assert f"stage {stage} " in message and file.name in message
    assert before in message and sha256_file(file) in message and "--run-dir" in message
    file.write_bytes(old)
    assert finished.go() == 0
    assert finished.take_started() == []


@pytest.mark.parametrize("path", ["iteration_000/train_synthetic_document.json", "initial/checkpoint/manifest.json"])
def test_a_missing_file_is_refused(finished: FakeRun, path: str) -> None:
    file = finished.run_dir / path
    old = file.read_bytes()
    file.unlink()
    with pytest.raises(InputError, match="no file"):
        finished.go()
    file.write_bytes(old)


def test_a_newer_checkpoint_than_the_marker_knows_is_refused(fake: FakeRun) -> None:
    fake.go()
    other = fake.run_dir / "iteration_000" / "checkpoint" / "step_00000008"
    other.mkdir()
    (other / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="step_00000008"):
        fake.go()


def test_a_hand_edited_run_config_is_refused(fake: FakeRun, config_of: Callable[..., Config]) -> None:
    """Also where the run is continued from that very file, so that there is nothing to compare it with."""
    fake.go()
    path = fake.run_dir / "run.yaml"
    path.write_text(path.read_text().replace("lr: 5.0e-07", "lr: 1.0e-06") + "# by hand\n")
    with pytest.raises(InputError, match="optimizer.lr: 1e-06 in the run, 5e-07 now"):
        fake.go()
    with pytest.raises(InputError, match=r"stage tokenize is done.*\n.*run.yaml \(settings that affect results\)"):
        fake.go(config_of(optimizer__lr=1e-6))


def test_a_broken_marker_is_refused(fake: FakeRun) -> None:
    fake.go()
    marker = fake.run_dir / "stages" / "convert.json"
    whole = json.loads(marker.read_text())
    others = [{**whole, name: 1} for name in ("inputs", "outputs", "released")]
    for text in ("{", "[]", '{"stage": "convert"}', *map(json.dumps, others)):
        marker.write_text(text)
        with pytest.raises(InputError, match=r"convert\.json"):
            fake.go()


def test_a_changed_report_is_only_made_again(fake: FakeRun) -> None:
    fake.go()
    (fake.run_dir / "report.html").write_text("by hand")
    fake.take_started()
    assert fake.go() == 0
    assert fake.take_started() == ["report"]


def test_a_marker_of_an_earlier_version_is_explained(fake: FakeRun) -> None:
    fake.go()
    path = fake.run_dir / "stages" / "convert.json"
    marker = json.loads(path.read_text())
    del marker["execution"], marker["released"]
    path.write_text(json.dumps(marker))
    with pytest.raises(InputError, match=r"convert\.json: has no execution, released, as markers of earlier versions"):
        fake.go()


def test_other_settings_are_refused_with_a_diff(fake: FakeRun, config_of: Callable[..., Config]) -> None:
    fake.go()
    before = (fake.run_dir / "run.yaml").read_bytes()
    with pytest.raises(InputError) as caught:
        fake.go(config_of(optimizer__lr=1e-6, self_play__iterations=1, training__micro_batch_size=1))
    message = str(caught.value)
    assert "optimizer.lr: 5e-07 in the run, 1e-06 now" in message
    assert "self_play.iterations: 2 in the run, 1 now" in message
    assert "seed" not in message and "micro_batch_size" not in message and "another --run-dir" in message
    assert (fake.run_dir / "run.yaml").read_bytes() == before


def test_relative_paths_are_the_same_run(
    fake: FakeRun, config_of: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.go()
    fake.take_started()
    monkeypatch.chdir(fake.world)
    relative = config_of(
        run_dir="run", data__annotated="train.jsonl", model__hf_checkpoint="base", evaluation__scorer="scorer.py:score"
    )
    assert fake.go(relative) == 0
    assert fake.take_started() == []


def test_dry_run_writes_nothing(fake: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    def look() -> list[str]:
        capsys.readouterr()
        before = {path: path.read_bytes() for path in fake.world.rglob("*") if path.is_file()}
        assert driver.run(fake.config, dry_run=True) == 0
        assert {path: path.read_bytes() for path in fake.world.rglob("*") if path.is_file()} == before
        return capsys.readouterr().out.splitlines()

    lines = look()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(" to do " in line for line in lines)
    assert not fake.run_dir.exists()
    fake.behave(train_000="fail1")
    with pytest.raises(StageError):
        fake.go()
    assert [" done " in line for line in look()] == [True] * 3 + [False] * 6
    (fake.run_dir / "data" / "train.jsonl").write_text("changed")
    assert " changed " in look()[0]


def test_bad_input_changes_nothing(fake: FakeRun) -> None:
    (fake.world / "train.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"train\.jsonl:1"):
        driver.run(fake.config, launcher=fake.launcher)
    assert not fake.run_dir.exists()
    assert fake.take_started() == []


def test_sft_without_held_out_data_runs(fake: FakeRun, config_of: Callable[..., Config]) -> None:
    config = config_of(objective__method="sft", data__held_out=None)
    assert fake.go(config) == 0
    assert fake.take_started() == [stage.name for stage in plan(config)]


def test_an_unfinished_iteration_keeps_what_it_has(fake: FakeRun) -> None:
    fake.behave(rollout_001="fail1")
    with pytest.raises(StageError):
        fake.go()
    shard = fake.run_dir / "iteration_001" / "synthetic" / "shard_00000.jsonl"
    shard.parent.mkdir(parents=True)
    shard.write_text("kept")
    fake.behave()
    assert fake.go() == 0
    assert shard.read_text() == "kept"


def test_only_run_dir_is_written(fake: FakeRun) -> None:
    before = {path for path in fake.world.rglob("*") if not path.is_relative_to(fake.run_dir)}
    fake.go()
    after = {path for path in fake.world.rglob("*") if not path.is_relative_to(fake.run_dir)}
    assert {path.name for path in after - before} == {"started.txt"}
    assert Path(fake.run_dir / "run.yaml").is_file()


def test_a_moved_run_goes_on_where_it_is(fake: FakeRun, world: Path) -> None:
    fake.go()
    fake.take_started()
    moved = world / "elsewhere" / "moved"
    moved.parent.mkdir()
    fake.run_dir.rename(moved)
    config = load_config(moved / "run.yaml", {})
    assert Path(config.run_dir) == moved
    fake.run_dir = moved
    assert fake.go(config) == 0 and fake.take_started() == []
    assert not Path(fake.config.run_dir).exists()


def test_a_copied_run_leaves_the_original_alone(fake: FakeRun, world: Path) -> None:
    fake.go()
    fake.take_started()
    original, copy = fake.run_dir, world / "copy"
    before = {path: path.stat().st_mtime_ns for path in original.rglob("*") if path.is_file()}
    shutil.copytree(original, copy)
    (copy / "report.html").write_text("another one")
    fake.run_dir = copy
    assert fake.go(load_config(copy / "run.yaml", {})) == 0 and fake.take_started() == ["report"]
    assert {path: path.stat().st_mtime_ns for path in original.rglob("*") if path.is_file()} == before


def test_a_run_yaml_that_names_another_folder_is_refused(fake: FakeRun, world: Path) -> None:
    fake.go()
    path = fake.run_dir / "run.yaml"
    path.write_text(path.read_text().replace("run_dir: .", f"run_dir: {world / 'other'}"))
    with pytest.raises(InputError, match=rf"{path}: lies in the folder of a run, but its run_dir is {world}/other"):
        load_config(path, {})
    assert load_config(path, {"run_dir": str(fake.run_dir)}).run_dir == str(fake.run_dir)


def test_a_stage_by_hand_keeps_to_the_settings_of_the_run(fake: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    fake.go()
    config = load_config(fake.run_dir / "run.yaml", {"optimizer.lr": 1e-3})
    with pytest.raises(InputError, match=r"optimizer.lr: 5e-07 in the run, 0.001 now"), only_writer(config):
        pass


@pytest.mark.parametrize(
    ("behaviour", "last"),
    [
        ("", "driver: stage tokenize: done in "),
        ("fail1", "the same command continues the run from here"),
        ("kill9", "the same command continues the run from here"),
    ],
)
def test_a_log_ends_with_how_the_stage_ended(behaviour: str, last: str, fake: FakeRun) -> None:
    fake.behave(tokenize=behaviour)
    if behaviour:
        with pytest.raises(StageError):
            fake.go()
    else:
        fake.go()
    lines = (fake.run_dir / "logs" / "tokenize.log").read_text().splitlines()
    assert last in lines[-1]
    if behaviour == "kill9":
        assert any("with signal SIGKILL (out of memory?)" in line for line in lines)
