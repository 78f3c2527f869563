from pathlib import Path

import pytest

from tests.selfplay.fake_world import write_world


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with everything a run reads."""
    return write_world(tmp_path)
