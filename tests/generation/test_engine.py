"""Generation equals transformers token for token, and depends on neither layout nor batch."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_tspin.config import ParallelSection
from tests.generation.answers import NEW_TOKENS, STOPS, answer, greedy_by_transformers, load, run_engine
from tests.rank_pool import in_layout
from tests.rounding import all_within

pytestmark = pytest.mark.exact

LAYOUTS = {
    "tp1": ParallelSection(),
    "tp2": ParallelSection(tensor_model_parallel_size=2),
    "pp2": ParallelSection(pipeline_model_parallel_size=2),
}
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


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
    for layout, slots, lag in (
        ("tp1", 1, 0),
        ("tp1", 4, 1),
        ("tp1", 4, 2),
        ("tp2", 5, 0),
        ("pp2", 5, 0),
        ("pp2", 4, 1),
    ):
        found = ranks(LAYOUTS[layout].world_size).run(answer, folder, LAYOUTS[layout], slots, settings, lag)[0]
        assert [(ids, ended) for ids, ended, *_ in found] == [(ids, ended) for ids, ended, *_ in expected]


def test_log_probs_as_sampled_are_those_that_training_computes(ranks: Any, tiny_checkpoint: Any) -> None:
    for ids, ended, log_probs, scored in ranks(1).run(answer, tiny_checkpoint("tied"), LAYOUTS["tp1"], 4, {})[0]:
        assert len(log_probs) == len(ids) <= NEW_TOKENS
        assert ended == (ids[-1] in STOPS)
        assert not any(token in STOPS for token in ids[:-1])
        all_within("log-prob", [sum(log_probs)], [scored])


def answer_at_near_ties(folder: Path, layout: ParallelSection, temperature: float) -> list[list[int]]:
    """On ranks: ids of answers where the two best tokens of a shard tie but for rounding, otherwise on odd ranks."""
    import torch

    from megatron_tspin.generation.backends import engine

    def near_tie(logits: Any, *arguments: Any) -> Any:
        best, second = logits.topk(2).indices.split(1, dim=-1)
        value = logits.gather(1, best)
        towards = torch.full_like(value, torch.inf if topology.rank % 2 else -torch.inf)
        return choose(logits.scatter(1, second, torch.nextafter(value, towards)), *arguments)

    choose = engine.choose
    with in_layout(layout) as topology, patch.object(engine, "choose", near_tie):
        answers = run_engine(
            load(folder, layout, topology), topology, [[5], [7, 8, 9], [40] * 6], {"temperature": temperature}
        )
        return [answer.ids for answer in answers]


@pytest.mark.parametrize("layout", [{"tensor_model_parallel_size": 2}, TP2_PP2], ids=str)
def test_ranks_whose_logits_differ_by_rounding_go_on_with_one_answer(
    layout: dict[str, int], ranks: Any, tiny_checkpoint: Any
) -> None:
    parallel = ParallelSection(**layout)
    found = ranks(parallel.world_size).run(answer_at_near_ties, tiny_checkpoint("untied"), parallel, 0.0)
    assert all(ids == found[0] for ids in found)
    assert max(map(len, found[0])) > 1
