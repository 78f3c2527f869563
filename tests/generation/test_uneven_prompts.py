"""A prompt far longer than its neighbours changes nothing for them, nor they for it."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_tspin.config import ParallelSection
from tests.generation.answers import NEW_TOKENS, greedy_by_transformers, load, run_engine
from tests.rank_pool import in_layout

PROMPTS = [[5], [3 + i % 90 for i in range(90)], [7, 8], [40] * 33]


def together_and_alone(folder: Path, layout: ParallelSection, temperature: float) -> Any:
    """Token ids of the answers of all slots at once, and of one."""
    settings = {"temperature": temperature}
    with in_layout(layout) as topology:
        model = load(folder, layout, topology)
        found = [run_engine(model, topology, PROMPTS, settings, slots) for slots in (len(PROMPTS), 1)]
        return [[answer.ids for answer in answers] for answers in found]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["tied", "mistral_window", "yarn"])
def test_one_long_prompt(kind: str, temperature: float, ranks: Any, tiny_checkpoint: Any) -> None:
    together, alone = ranks(1).run(together_and_alone, tiny_checkpoint(kind), ParallelSection(), temperature)[0]
    assert together == alone
    assert all(0 < len(ids) <= NEW_TOKENS for ids in together)


def answer_greedily(folder: Path, slots: int) -> list[list[int]]:
    with in_layout(ParallelSection()) as topology, patch("megatron_tspin.models.segment_plan._CALL", 0.0):
        model = load(folder, ParallelSection(), topology)
        return [answer.ids for answer in run_engine(model, topology, PROMPTS, {"temperature": 0.0}, slots)]


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_prompts_that_attention_takes_block_by_block(slots: int, ranks: Any, tiny_checkpoint: Any) -> None:
    folder = tiny_checkpoint("tied")
    assert ranks(1).run(answer_greedily, folder, slots)[0] == greedy_by_transformers(folder, PROMPTS)


def test_one_new_token(ranks: Any, tiny_checkpoint: Any) -> None:
    assert ranks(1).run(answer_one, tiny_checkpoint("tied"))[0] == [1, 1, 1, 1]


def answer_one(folder: Path) -> list[int]:
    with in_layout(ParallelSection()) as topology:
        model = load(folder, ParallelSection(), topology)
        return [len(answer.ids) for answer in run_engine(model, topology, PROMPTS, {"max_new_tokens": 1})]


def answer_with_broken_weights(folder: Path, layout: ParallelSection) -> str:
    import torch

    from megatron_tspin.errors import DivergenceError

    with in_layout(layout) as topology:
        model = load(folder, layout, topology)
        if topology.is_last_pipeline_stage:
            with torch.no_grad():
                list(model.parameters())[-1].fill_(float("nan"))
        try:
            run_engine(model, topology, PROMPTS, {"max_new_tokens": 2})
        except DivergenceError as error:
            return str(error)
        return ""


@pytest.mark.parametrize("layout", [{"pipeline_model_parallel_size": 2}, {"tensor_model_parallel_size": 2}], ids=str)
def test_a_policy_that_is_not_finite_says_so_on_every_rank(
    layout: dict[str, int], ranks: Any, tiny_checkpoint: Any
) -> None:
    found = ranks(2).run(answer_with_broken_weights, tiny_checkpoint("untied"), ParallelSection(**layout))
    assert found == ["the policy's log-probs are not finite: its weights hold NaN or infinity"] * 2
