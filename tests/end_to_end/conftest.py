from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.runs import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Finished runs, each made once for all tests."""
    found = Runs(tmp_path_factory.mktemp("runs"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def base_run(runs: Runs) -> Path:
    """Folder of a finished T-SPIN run on one rank. Do not write into it."""
    return runs["tp1"]
