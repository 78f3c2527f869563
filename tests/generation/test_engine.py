"""Generation equals transformers token for token, and depends on neither layout nor batch."""

from typing import Any

import pytest

from megatron_tspin.config import ParallelSection
from tests.generation.answers import EOS, NEW_TOKENS, answer, greedy_by_transformers
from tests.rounding import all_within

pytestmark = pytest.mark.exact

LAYOUTS = {
    "tp1": ParallelSection(),
    "tp2": ParallelSection(tensor_model_parallel_size=2),
    "pp2": ParallelSection(pipeline_model_parallel_size=2),
}


@pytest.mark.parametrize("kind", ["tied", "llama3_rope", "mistral_window"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_is_that_of_transformers(layout: str, kind: str, ranks: Any, tiny_checkpoint: Any) -> None:
    folder, parallel = tiny_checkpoint(kind), LAYOUTS[layout]
    found = ranks(parallel.world_size).run(answer, folder, parallel, 5, {"temperature": 0.0})
    expected = greedy_by_transformers(folder)
    for rank in found:
        assert [ids for ids, *_ in rank] == expected


@pytest.mark.parametrize(
    "settings", [{}, {"top_p": 0.95, "temperature": 1.7}, {"top_k": 50, "temperature": 3.0}], ids=str
)
def test_samples_depend_on_neither_layout_nor_batch(settings: Any, ranks: Any, tiny_checkpoint: Any) -> None:
    folder = tiny_checkpoint("untied")
    expected = ranks(1).run(answer, folder, LAYOUTS["tp1"], 13, settings)[0]
    lengths = {len(ids) for ids, *_ in expected}
    assert len(lengths) > 1, "the samples have to end at different places, or this test shows little"
    for layout, batch_size in (("tp1", 1), ("tp1", 4), ("tp2", 5), ("pp2", 5)):
        found = ranks(LAYOUTS[layout].world_size).run(answer, folder, LAYOUTS[layout], batch_size, settings)[0]
        assert [(ids, ended) for ids, ended, *_ in found] == [(ids, ended) for ids, ended, *_ in expected]


def test_log_probs_as_sampled_are_those_that_training_computes(ranks: Any, tiny_checkpoint: Any) -> None:
    for ids, ended, log_probs, scored in ranks(1).run(answer, tiny_checkpoint("tied"), LAYOUTS["tp1"], 4, {})[0]:
        assert len(log_probs) == len(ids) <= NEW_TOKENS
        assert ended == (ids[-1] == EOS)
        assert EOS not in ids[:-1]
        all_within("log-prob", [sum(log_probs)], [scored])
