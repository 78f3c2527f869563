from pathlib import Path

import pytest

from tests.selfplay.fake_world import write_world


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with everything a run reads."""
    return write_world(tmp_path)


@pytest.fixture(autouse=True)
def untouched_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that are called in pytest's own process leave its torch as it is."""
    monkeypatch.setattr("megatron_tspin.platform.prepare_platform", lambda cpu_threads=1: None)
