"""`tspin doctor` on the ranks of this host; `tests/slurm` has two nodes."""

from pathlib import Path

import pytest

from tests.end_to_end.small_run import succeed, tree_of, write_config, write_data

pytestmark = pytest.mark.processes


def test_ranks_of_this_host(tmp_path: Path) -> None:
    write_data(tmp_path)
    tree = tree_of(tmp_path, tmp_path / "run", parallel__data_parallel_size=2)
    config = write_config(tmp_path / "run.yaml", tree)
    done = succeed("doctor", "--config", config)
    assert "2 ranks on " in done.stderr and "all-reduce over DP x CP (2 ranks): " in done.stderr
    assert "doctor: nothing stands in the way" in (tmp_path / "run" / "doctor" / "logs" / "doctor.log").read_text()
    assert not (tmp_path / "run" / "run.yaml").exists()
