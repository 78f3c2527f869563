"""A prompt far longer than its neighbours changes nothing for them, nor they for it."""

from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import ParallelSection
from tests.generation.answers import NEW_TOKENS, STOPS, load
from tests.rank_pool import in_layout

PROMPTS = [[5], [3 + i % 90 for i in range(90)], [7, 8], [40] * 33]


def together_and_alone(folder: Path, layout: ParallelSection, temperature: float) -> Any:
    """Token ids of the answers of one batch, and of a batch each."""
    from megatron_tspin.generation.engine import Engine
    from megatron_tspin.generation.sampling import Decoding, keyed_uniforms

    decoding = Decoding(temperature=temperature, top_p=1.0, top_k=0, max_new_tokens=NEW_TOKENS)
    uniforms = [keyed_uniforms(2, "uneven", str(index), NEW_TOKENS) for index in range(len(PROMPTS))]
    with in_layout(layout) as topology:
        engine = Engine(load(folder, layout, topology), topology, STOPS)
        together = engine.answer(PROMPTS, uniforms, decoding)
        alone = [engine.answer([p], [u], decoding)[0] for p, u in zip(PROMPTS, uniforms, strict=True)]
        return [answer.ids for answer in together], [answer.ids for answer in alone]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["tied", "mistral_window", "yarn"])
def test_one_long_prompt(kind: str, temperature: float, ranks: Any, tiny_checkpoint: Any) -> None:
    together, alone = ranks(1).run(together_and_alone, tiny_checkpoint(kind), ParallelSection(), temperature)[0]
    assert together == alone
    assert all(0 < len(ids) <= NEW_TOKENS for ids in together)


def test_one_new_token(ranks: Any, tiny_checkpoint: Any) -> None:
    assert ranks(1).run(answer_one, tiny_checkpoint("tied"))[0] == [1, 1, 1, 1]


def answer_one(folder: Path) -> list[int]:
    from megatron_tspin.generation.engine import Engine
    from megatron_tspin.generation.sampling import Decoding, keyed_uniforms

    uniforms = [keyed_uniforms(2, "one", str(index), 1) for index in range(len(PROMPTS))]
    with in_layout(ParallelSection()) as topology:
        engine = Engine(load(folder, ParallelSection(), topology), topology, STOPS)
        return [len(answer.ids) for answer in engine.answer(PROMPTS, uniforms, Decoding(1.0, 1.0, 0, 1))]


def answer_with_broken_weights(folder: Path, layout: ParallelSection) -> str:
    import torch

    from megatron_tspin.errors import DivergenceError
    from megatron_tspin.generation.engine import Engine
    from megatron_tspin.generation.sampling import Decoding, keyed_uniforms

    uniforms = [keyed_uniforms(2, "broken", str(index), 2) for index in range(len(PROMPTS))]
    with in_layout(layout) as topology:
        model = load(folder, layout, topology)
        if topology.is_last_pipeline_stage:
            with torch.no_grad():
                list(model.parameters())[-1].fill_(float("nan"))
        try:
            Engine(model, topology, STOPS).answer(PROMPTS, uniforms, Decoding(1.0, 1.0, 0, 2))
        except DivergenceError as error:
            return str(error)
        return ""


@pytest.mark.parametrize("layout", [{"pipeline_model_parallel_size": 2}, {"tensor_model_parallel_size": 2}], ids=str)
def test_a_policy_that_is_not_finite_says_so_on_every_rank(
    layout: dict[str, int], ranks: Any, tiny_checkpoint: Any
) -> None:
    found = ranks(2).run(answer_with_broken_weights, tiny_checkpoint("untied"), ParallelSection(**layout))
    assert found == ["the policy's log-probs are not finite: its weights hold NaN or infinity"] * 2
