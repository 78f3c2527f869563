"""Scoring packs its rows: neighbours with one prompt share it, and scores come back in the order of the input."""

import random
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import ParallelSection, TrainingSection
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.objective.rows import Pair, Rows
from tests.rank_pool import in_layout
from tests.rounding import all_within


def score(folder: Path, layout: ParallelSection, pairs: list[Pair], row_tokens: int) -> tuple[list[float], list[Any]]:
    """The scores, and of each row that this rank ran: its length, its used places and the places of its prompts."""
    from unittest.mock import patch

    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.models.hf_config import read_architecture
    from megatron_tspin.models.provider import make_model_provider
    from megatron_tspin.objective import scoring

    made: list[Rows] = []

    def remember(*arguments: Any) -> Rows:
        made.append(pack_row(*arguments))
        return made[-1]

    pack_row = scoring.pack_row
    with in_layout(layout) as topology, patch.object(scoring, "pack_row", remember):
        provider = make_model_provider(read_architecture(folder), layout, TrainingSection(), PrecisionSection())
        model = provider(pre_process=topology.is_first_pipeline_stage, post_process=topology.is_last_pipeline_stage)
        load_hf(model, topology)
        scores = scoring.score_pairs(model, topology, pairs, row_tokens)
        return scores, [(rows.row_length, rows.used, rows.prompt_places) for rows in made]


def ids(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(3, 101) for _ in range(count)]


def alone(found: Any, pairs: list[Pair], one_by_one: Any) -> None:
    """Each score is that of the pair in a row of its own."""
    all_within("log-prob", found, [one_by_one([pair])[0][0][0] for pair in pairs])


def test_neighbours_with_one_prompt_share_it(ranks: Any, tiny_checkpoint: Any) -> None:
    chance = random.Random(3)
    first, second = ids(chance, 9), ids(chance, 5)
    answers = [ids(chance, size) for size in (4, 1, 7, 2, 3)]
    prompts = [first, list(first), first, second, first]  # an equal list is the same prompt; the last is no neighbour
    pairs: list[Pair] = list(zip(prompts, answers, strict=True))
    folder = tiny_checkpoint("tied")

    def run(some: list[Pair]) -> Any:
        return ranks(1).run(score, folder, ParallelSection(), some, 1000)

    [(found, [(length, used, of_prompts)])] = run(pairs)
    assert of_prompts == 9 + 5 + 9
    assert used == of_prompts + sum(len(answer) - 1 for answer in answers)
    assert length == 40
    alone(found, pairs, run)


@pytest.mark.parametrize(
    "layout",
    [{"data_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}],
    ids=lambda layout: next(iter(layout)),
)
def test_scores_come_in_the_order_of_the_input(layout: dict[str, int], ranks: Any, tiny_checkpoint: Any) -> None:
    """Rows are balanced, so responses meet in another order than they came in; several runs of the schedule."""
    chance = random.Random(4)
    pairs: list[Pair] = [(ids(chance, chance.randint(1, 20)), ids(chance, chance.randint(1, 25))) for _ in range(30)]
    pairs[7:7] = [(pairs[6][0], ids(chance, size)) for size in (3, 1, 20)]
    folder = tiny_checkpoint("untied")
    expected = ranks(1).run(score, folder, ParallelSection(), pairs, 10_000)[0][0]
    assert len({round(value, 3) for value in expected}) == len(pairs), "a wrong order would not be seen"
    found = ranks(2).run(score, folder, ParallelSection(**layout), pairs, 64)
    for scores, rows in found:
        all_within("log-prob", scores, expected)
        assert len(rows) > 2 and all(used <= length for length, used, _ in rows)
        assert max(length for length, _, _ in rows) <= 64


def test_a_shared_prompt_takes_as_many_rows_as_it_needs() -> None:
    from megatron_tspin.objective.scoring import _shared

    bundles = _shared([([1] * 100, [2] * 2000)] * 5, 5000)
    assert [bundle.indices for bundle in bundles] == [[0, 1], [2, 3], [4]]
    assert all(bundle.shape.row_tokens(share_prompts=True) <= 5000 for bundle in bundles)
