import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.runs import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Finished runs, each made once for all tests."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "runs"
    folder.mkdir(exist_ok=True)
    found = Runs(folder)
    yield found
    found.close()


@pytest.fixture(scope="session")
def base_run(runs: Runs) -> Path:
    """Folder of a finished T-SPIN run on one rank. Do not write into it."""
    return runs["tp1"]
