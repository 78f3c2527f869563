"""Policies that are no longer kept go, and nothing takes them for missing afterwards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import Config
from megatron_tspin.errors import InputError, StageError
from megatron_tspin.selfplay import retention
from megatron_tspin.selfplay.retention import superfluous_policies
from tests.selfplay.fake_world import FakeRun

pytestmark = pytest.mark.processes

ConfigOf = Callable[..., Config]
LAST = 5


def decoding(accuracy: float | None) -> dict[str, Any]:
    return {"num_prompts": 3, "accuracy": accuracy, "standard_error": 0.1, "ended_share": 1.0, "mean_tokens": 2.0}


def result(policy: int, sampled: float | None, greedy: float | None, nll: float) -> dict[str, Any]:
    return {
        "iteration": policy,
        "sampled": decoding(sampled),
        "greedy": decoding(greedy),
        "log_prob_annotated": -1.0,
        "log_prob_sampled": -1.0,
        "nll_per_token": nll,
    }


SAMPLED = [0.9, 0.1, 0.5, 0.2, 0.2, 0.3]
GREEDY = [0.0, 0.0, 0.0, 0.9, 0.0, 0.0]
NLL = [9.0, 1.0, 2.0, 3.0, 3.0, 3.0]


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best trained policy is 2 by its sampled answers, 3 by its greedy ones, 1 by likelihood."""
    results = {f"policy_{n:03d}": result(n, SAMPLED[n], GREEDY[n], NLL[n]) for n in range(LAST + 1)}
    monkeypatch.setenv("TSPIN_TEST_EVALUATIONS", json.dumps(results))


def kept(fake: FakeRun) -> list[int]:
    return [n for n in range(1, LAST + 1) if (fake.run_dir / f"iteration_{n - 1:03d}" / "checkpoint").is_dir()]


def longer(config_of: ConfigOf, **changes: Any) -> Config:
    return config_of(self_play__iterations=LAST, **changes)


@pytest.mark.usefixtures("evaluated")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [2, 4, 5]),
        ({"self_play__keep_policies": 1}, [2, 5]),
        ({"self_play__keep_policies": 3}, [2, 3, 4, 5]),
        ({"self_play__keep_policies": 0}, [1, 2, 3, 4, 5]),
        ({"self_play__keep_policies": 9}, [1, 2, 3, 4, 5]),
        ({"data__held_out": None}, [4, 5]),
    ],
    ids=str,
)
def test_the_last_ones_and_the_best_are_kept(
    changes: dict[str, Any], expected: list[int], fake: FakeRun, config_of: ConfigOf
) -> None:
    config = longer(config_of, **changes)
    assert fake.go(config) == 0
    assert kept(fake) == expected
    assert (fake.run_dir / "initial" / "checkpoint" / "manifest.json").is_file()
    fake.take_started()
    assert fake.go(config) == 0
    assert fake.take_started() == [] and kept(fake) == expected


@pytest.mark.parametrize(
    ("sampled", "greedy", "best"), [(SAMPLED, GREEDY, 2), (None, GREEDY, 3), (None, None, 1), ([0.5] * 6, GREEDY, 1)]
)
def test_the_best_is_judged_by_accuracy_or_else_by_likelihood(
    sampled: list[float] | None, greedy: list[float] | None, best: int, config_of: ConfigOf
) -> None:
    config = longer(config_of, self_play__keep_policies=1)
    folder = Path(config.run_dir) / "evaluation"
    folder.mkdir(parents=True)
    for n in range(LAST + 1):
        values = [values[n] if values else None for values in (sampled, greedy)]
        (folder / f"policy_{n:03d}.json").write_text(json.dumps(result(n, values[0], values[1], NLL[n])))
    assert superfluous_policies(config, LAST) == [n for n in range(1, LAST) if n != best]
    (folder / "policy_003.json").write_text("{}")
    with pytest.raises(InputError, match=r"policy_003\.json: not the held-out results"):
        superfluous_policies(config, LAST)


@pytest.mark.usefixtures("evaluated")
def test_a_marker_names_what_was_released(fake: FakeRun, config_of: ConfigOf) -> None:
    fake.go(longer(config_of))
    markers = {path.stem: json.loads(path.read_text()) for path in (fake.run_dir / "stages").iterdir()}
    found = {name: marker["released"] for name, marker in markers.items() if marker["released"]}
    assert found == {"train_000": ["iteration_000/checkpoint"], "train_002": ["iteration_002/checkpoint"]}
    assert "iteration_000/checkpoint/step_00000004/manifest.json" in markers["train_000"]["outputs"]


@pytest.mark.usefixtures("evaluated")
@pytest.mark.parametrize("moment", ["before the marker", "before the first file", "between two files"])
def test_an_interrupted_release_is_finished(
    moment: str, fake: FakeRun, config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        if moment == "between two files":
            (args[0] / "step_00000004" / "manifest.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "before the marker":
            patch.setattr(retention.markers, "record_release", stop)
        else:
            patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            fake.go(longer(config_of))
    assert kept(fake) == [1, 2, 3]
    fake.take_started()
    assert fake.go(longer(config_of)) == 0
    assert fake.take_started() == ["train_003", "rollout_004", "train_004", "rollout_005", "export", "report"]
    assert kept(fake) == [2, 4, 5]


@pytest.mark.usefixtures("evaluated")
def test_a_file_that_went_without_being_released_is_missed(fake: FakeRun, config_of: ConfigOf) -> None:
    fake.go(longer(config_of))
    shutil.rmtree(fake.run_dir / "iteration_001" / "checkpoint")
    with pytest.raises(InputError, match=r"iteration_001/checkpoint.*no file"):
        fake.go(longer(config_of))


@pytest.mark.usefixtures("evaluated")
def test_a_finished_run_may_be_told_to_keep_less(fake: FakeRun, config_of: ConfigOf) -> None:
    fake.go(longer(config_of, self_play__keep_policies=0))
    fake.take_started()
    assert fake.go(longer(config_of, self_play__keep_policies=1)) == 0
    assert fake.take_started() == [] and kept(fake) == [2, 5]


@pytest.mark.usefixtures("evaluated")
def test_what_an_open_stage_reads_stays(fake: FakeRun, config_of: ConfigOf) -> None:
    fake.behave(train_003="fail1")
    with pytest.raises(StageError):
        fake.go(longer(config_of))
    (fake.run_dir / "stages" / "train_002.json").unlink()  # by hand: policy 2 is read again
    retention.release_policies(longer(config_of, self_play__keep_policies=1, data__held_out=None), latest=4)
    assert 2 in kept(fake)
