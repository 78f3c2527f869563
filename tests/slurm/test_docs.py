"""Every command of docs/slurm.md, one after the other, as a person would type them on the login node."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from tests.end_to_end.small_run import REPOSITORY, environment, tree_of, write_config, write_data
from tests.slurm.conftest import Cluster, wait_for

ONE_RANK_A_NODE = {
    "parallel__data_parallel_size": 2,
    "launch__gpus_per_node": 0,
    "launch__ranks_per_node": 1,
    "launch__partition": "low",
}
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```$", (REPOSITORY / "docs" / "slurm.md").read_text(), re.S | re.M)
    for line in block.splitlines()
]


def test_every_command_works(cluster: Cluster, tmp_path: Path) -> None:
    write_data(tmp_path)
    tree = tree_of(tmp_path, tmp_path / "runs" / "first", **ONE_RANK_A_NODE)
    write_config(tmp_path / "run.yaml", tree)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    jobs, out = [], ""
    for line in COMMANDS:
        if line.startswith("srun"):
            cluster.wait_for_state(jobs[-1], "COMPLETED", seconds=240)
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env=environment(PATH=path),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        out += done.stdout
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        if line.startswith("tspin submit") and "--dry-run" not in line:
            jobs.append(done.stdout.strip())
            wait_for(lambda: (tmp_path / "runs/first/logs/tokenize.log").exists(), lambda: cluster.run("squeue"))
        if "tspin doctor" in line:
            assert "doctor: nothing stands in the way" in done.stderr
        if line.startswith("scancel"):
            cluster.wait_for_state(jobs[-1], "CANCELLED")
    assert len(jobs) == 2 and "state   running: process" in out
    marker = yaml.safe_load((tmp_path / "runs/first/stages/export.json").read_text())
    assert marker["place"]["job"] == jobs[-1] and marker["place"]["nodes"] == "n[1-2]"
