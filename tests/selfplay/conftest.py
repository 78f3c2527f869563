from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tspin.config import Config
from tests.selfplay.fake_world import FakeRun, tree_of, write_world


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with everything a run reads."""
    return write_world(tmp_path)


@pytest.fixture
def config_of(world: Path) -> Callable[..., Config]:
    """Makes the config of a run in `world`; settings as `section__name=value`."""
    return lambda **overrides: Config.model_validate(tree_of(world, **overrides))


@pytest.fixture
def fake(world: Path, config_of: Callable[..., Config]) -> FakeRun:
    return FakeRun(world, config_of())
