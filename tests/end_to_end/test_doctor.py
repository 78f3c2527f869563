"""`tspin doctor` on the ranks of this host; `tests/slurm` has two nodes."""

from pathlib import Path

import pytest

from tests.end_to_end.small_run import succeed, tree_of, tspin, write_config, write_data

pytestmark = pytest.mark.processes


def test_ranks_of_this_host(tmp_path: Path) -> None:
    write_data(tmp_path)
    tree = tree_of(tmp_path, tmp_path / "run", parallel__data_parallel_size=2)
    config = write_config(tmp_path / "run.yaml", tree)
    done = succeed("doctor", "--config", config)
    assert "2 ranks on " in done.stderr and "all-reduce over DP x CP (2 ranks): " in done.stderr
    assert "doctor: nothing stands in the way" in (tmp_path / "run" / "doctor" / "logs" / "doctor.log").read_text()
    assert not (tmp_path / "run" / "run.yaml").exists()

    (tmp_path / "run" / "doctor" / "doctor").write_text("a file where probes should go")
    failed = tspin("doctor", "--config", config)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr.partition("tspin: error")[2]
    assert "cannot write to" in failed.stderr and "put --run-dir on a file system that all nodes mount" in failed.stderr
