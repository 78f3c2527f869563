"""A rank that fails says so, and ends what waits for it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from megatron_tspin.errors import StageError

pytestmark = pytest.mark.processes

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("failing_rank.py")
START_SECONDS = 90.0  # to import torch and megatron-core on cores that others use too
END_SECONDS = 15.0


def start(rank: int, port: int, error: str, log_file: Path) -> "subprocess.Popen[str]":
    env = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "TSPIN_LOG_FILE": str(log_file),
    }
    return subprocess.Popen([sys.executable, str(PROGRAM), error], env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("error", "code", "message", "said"),
    [
        ("input", 2, "line 3 is bad", "tspin: error (rank 1): line 3 is bad"),
        ("bug", 1, "KeyError: 'a bug'", "unexpected failure of rank 1"),
    ],
)
def test_the_first_failure_is_told_and_ends_the_peers(
    error: str, code: int, message: str, said: str, tmp_path: Path
) -> None:
    # As torchrun's agent does: a port that was free a moment ago may be another process's by the time a rank wants it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    log_file, failure = tmp_path / "train_000.log", tmp_path / "train_000.failure.json"
    ranks = [start(rank, store.port, error, log_file) for rank in range(2)]
    try:
        deadline = time.monotonic() + START_SECONDS
        while not failure.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert json.loads(failure.read_text()) == {
            "rank": 1,
            "exit_code": code,
            "message": message,
            "consequence": False,
        }
        deadline = time.monotonic() + END_SECONDS
        errors = [rank.communicate(timeout=max(0.1, deadline - time.monotonic()))[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [StageError.exit_code, code]
    assert said in errors[1]
    assert "tspin: error: lost another rank in all_reduce" in errors[0] and "Traceback" not in errors[0]
