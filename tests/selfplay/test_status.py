"""What a run tells of itself while it runs, waits or is done."""

import json
import os
from pathlib import Path

import pytest

from megatron_tspin.cli.main import main
from megatron_tspin.errors import StageError
from megatron_tspin.heartbeat import beat_file
from megatron_tspin.run_folder import RunFolder, beats_folder, rank_log
from megatron_tspin.selfplay.lock import run_lock
from megatron_tspin.selfplay.status import describe_run, run_config
from tests.selfplay.fake_world import FakeRun

pytestmark = pytest.mark.processes


def status(fake: FakeRun) -> list[str]:
    return list(describe_run(run_config(fake.run_dir)))


def write_beat(folder: Path, rank: int, doing: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    beat = {"rank": rank, "pid": 7, "host": f"n{rank + 1}", "count": 3, "doing": doing, "kind": "step"}
    beat_file(folder, rank).write_text(json.dumps(beat))


def test_a_run_that_failed_says_where_and_why(fake: FakeRun) -> None:
    fake.behave(train_001="refuse5")
    with pytest.raises(StageError):
        fake.go()
    lines = status(fake)
    assert lines[0] == f"run     {fake.run_dir} (tspin, self-play iterations: 2)"
    assert lines[1] == "state   not running; the command that began it continues it"
    stages = [line.split() for line in lines[2:] if line.startswith("  ")]
    names = "tokenize convert rollout_000 train_000 rollout_001 train_001 rollout_002 export report"
    assert [words[0] for words in stages[:9]] == names.split()
    assert [words[1] for words in stages[:9]] == ["done"] * 5 + ["next", "to", "to", "to"]
    (left,) = (line for line in lines if line.startswith("left"))
    assert "if stages take as long as those before" in left
    assert lines[-3:] == [
        "why     rank 0, exit code 5:",
        "  line 3 is wrong",
        f"log     {fake.run_dir / 'logs' / 'train_001.log'}",
    ]


def test_a_run_that_runs_says_where(fake: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.behave(train_000="fail1")
    with pytest.raises(StageError):
        fake.go()
    write_beat(beats_folder(RunFolder(fake.run_dir).log("train_000")), 1, "train iteration 0, step 3 of 8")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with run_lock(fake.run_dir):
        lines = status(fake)
    assert lines[1].startswith(f"state   running: process {os.getpid()} on host ")
    assert ", Slurm job 17, since 2" in lines[1]
    assert "left    not known before the first train is done" in lines
    assert "  rank 1 on n2: train iteration 0, step 3 of 8 (0 s ago)" in lines


def test_a_submitted_run_says_what_slurm_says(fake: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.go()
    (fake.run_dir / "job.txt").write_text("17\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text('#!/bin/sh\necho "$2 PENDING"\n')
    (tmp_path / "bin" / "squeue").chmod(0o755)
    assert status(fake)[1] == "state   done"
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert "job     17: --jobs=17 PENDING" in status(fake)


def test_logs_of_a_stage_and_of_a_rank(fake: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    fake.behave(train_000="fail1")
    with pytest.raises(StageError):
        fake.go()
    log = RunFolder(fake.run_dir).log("train_000")
    log.write_text("".join(f"line {number}\n" for number in range(9)))
    rank_log(beats_folder(log), 3).parent.mkdir(exist_ok=True)
    rank_log(beats_folder(log), 3).write_text("NCCL WARN\n")
    for arguments, expected in (
        ((), "".join(f"line {number}\n" for number in range(9))),
        (("train_000", "--lines", "2"), "line 7\nline 8\n"),
        (("--rank", "3"), "NCCL WARN\n"),
    ):
        assert main(["logs", str(fake.run_dir), *arguments]) == 0
        assert capsys.readouterr().out == expected
    assert main(["logs", str(fake.run_dir), "export"]) == 2
    assert "export.log: is not there; either export has not begun" in capsys.readouterr().err


def test_what_libraries_said_is_shown_where_no_rank_gave_a_reason(fake: FakeRun) -> None:
    fake.behave(train_000="crash")
    with pytest.raises(StageError) as caught:
        fake.go()
    lines = str(caught.value).splitlines()
    assert "  rank 0 was in `train iteration 0, step 3 of 8`" in lines
    place = lines.index("  rank_00000.log:")
    assert lines[place + 1 : place + 3] == [
        "    Fatal Python error: Segmentation fault",
        '    File "x.py", line 3 in step',
    ]


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "no run.yaml, so no run was begun there" in capsys.readouterr().err


def test_env_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"torch", "megatron-core", "python"} <= found["versions"].keys()
    assert found["machine"]["cores"] == os.cpu_count() and found["place"]["host"]
