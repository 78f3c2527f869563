"""Each rank's libraries have a log of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tspin.run_folder import beats_folder, rank_log

pytestmark = pytest.mark.processes

REPOSITORY = Path(__file__).resolve().parents[1]
CODE = """
import os, sys
from megatron_tspin.rank_stderr import separate_stderr
separate_stderr()
sys.stderr.write("from Python\\n")
os.write(2, b"from C\\n")
"""


def run(code: str, log_file: Path, rank: int) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "TSPIN_LOG_FILE": str(log_file), "RANK": str(rank), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("rank", "terminal", "log"), [(0, "from Python\n", "from C\n"), (3, "", "from Python\nfrom C\n")]
)
def test_what_goes_where(rank: int, terminal: str, log: str, tmp_path: Path) -> None:
    done = run(CODE, tmp_path / "x.log", rank)
    assert (done.returncode, done.stderr) == (0, terminal)
    assert rank_log(beats_folder(tmp_path / "x.log"), rank).read_text() == log


def test_a_crash_leaves_its_stack(tmp_path: Path) -> None:
    crash = "import os, signal\nfrom megatron_tspin.rank_stderr import separate_stderr\nseparate_stderr()\n"
    done = run(f"{crash}os.kill(os.getpid(), signal.SIGSEGV)\n", tmp_path / "x.log", 1)
    assert done.returncode < 0 and done.stderr == ""
    said = rank_log(beats_folder(tmp_path / "x.log"), 1).read_text()
    assert said.startswith("Fatal Python error: Segmentation fault") and "line 4 in <module>" in said
