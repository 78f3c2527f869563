from pathlib import Path
from typing import Any

import pytest

from tests.training.rescored import save_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, ranks: Any, tiny_checkpoint: Any) -> Path:
    """The checkpoint of a policy to start from."""
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    ranks(1).run(save_policy, tiny_checkpoint("tied"), folder)
    return folder
