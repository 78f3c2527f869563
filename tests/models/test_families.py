"""Every family's log-probs are those of transformers, token by token, and its weights come back bit for bit."""

from typing import Any

import pytest

from megatron_tspin.config import ParallelSection
from tests.models.test_against_transformers import judge, pairs_of, score
from tests.tiny_checkpoint import DENSE

pytestmark = pytest.mark.exact

LAYOUTS = {
    "tp1": {},
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", DENSE)
def test_log_probs(kind: str, layout: str, ranks: Any, tiny_checkpoint: Any) -> None:
    folder, pairs, parallel = tiny_checkpoint(kind), pairs_of(5), ParallelSection(**LAYOUTS[layout])
    found = ranks(parallel.world_size).run(score, folder, parallel, pairs, 100)[0]
    for ours, theirs, (_, response) in zip(found, judge(folder, pairs), pairs, strict=True):
        assert abs(ours - theirs) / len(response) < 5e-6
