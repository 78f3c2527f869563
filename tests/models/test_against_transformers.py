"""The policy's log-probs are those of transformers, for every rope type and whatever the shape of the work."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tspin.config import ParallelSection, TrainingSection
from megatron_tspin.config_precision import PrecisionSection
from tests.rank_pool import in_layout
from tests.rounding import all_within

pytestmark = pytest.mark.exact


def pairs_of(count: int, longest: int = 70) -> list[tuple[list[int], list[int]]]:
    chance = random.Random(5)
    ids = [[chance.randrange(3, 101) for _ in range(longest)] for _ in range(count)]
    cuts = [(chance.randint(1, longest - 2), chance.randint(2, longest)) for _ in ids]
    return [(row[:cut], row[cut : max(cut + 1, end)]) for row, (cut, end) in zip(ids, cuts, strict=True)]


def score(folder: Path, layout: ParallelSection, pairs: Any, row_tokens: int, bf16: bool = False) -> list[float]:
    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.models.hf_config import read_architecture
    from megatron_tspin.models.provider import make_model_provider
    from megatron_tspin.objective.scoring import score_pairs

    with in_layout(layout) as topology:
        provider = make_model_provider(
            read_architecture(folder), layout, TrainingSection(), PrecisionSection(bf16=bf16)
        )
        model = provider(pre_process=topology.is_first_pipeline_stage, post_process=topology.is_last_pipeline_stage)
        load_hf(model, topology)
        return score_pairs(model, topology, pairs, row_tokens)


def judge(folder: Path, pairs: Any) -> list[float]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with torch.no_grad():
        for prompt, response in pairs:
            log_probs = torch.log_softmax(model(torch.tensor([[*prompt, *response]])).logits[0].double(), dim=-1)
            found.append(log_probs[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None]).sum().item())
    return found


@pytest.mark.parametrize("kind", ["linear_rope", "yarn", "llama3_rope", "mistral_window"])
def test_rope_types(kind: str, ranks: Any, tiny_checkpoint: Any) -> None:
    folder, pairs = tiny_checkpoint(kind), pairs_of(5)
    assert max(len(prompt) + len(response) for prompt, response in pairs) > 40, "beyond the original positions"
    found = ranks(1).run(score, folder, ParallelSection(), pairs, 100)[0]
    all_within("log-prob", found, judge(folder, pairs))


@pytest.mark.parametrize(
    ("layout", "count", "row_tokens"),
    [
        ({"data_parallel_size": 2}, 1, 24),  # one row for two replicas
        ({"data_parallel_size": 2}, 9, 24),  # a row a response, several runs of the schedule
        ({"data_parallel_size": 2}, 9, 1000),
        ({"pipeline_model_parallel_size": 2}, 1, 1000),  # fewer micro-batches than pipeline stages
        ({"pipeline_model_parallel_size": 2}, 15, 1),  # every response is longer than a row should be
        ({"pipeline_model_parallel_size": 2}, 9, 40),
        ({"tensor_model_parallel_size": 2}, 5, 40),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 5, 1000),
        ({"context_parallel_size": 2}, 1, 24),
        ({"context_parallel_size": 2}, 9, 40),
    ],
)
def test_scoring_of_few_and_many(
    layout: dict[str, int], count: int, row_tokens: int, ranks: Any, tiny_checkpoint: Any
) -> None:
    folder, pairs = tiny_checkpoint("tied"), pairs_of(count, 20)
    found = ranks(2).run(score, folder, ParallelSection(**layout), pairs, row_tokens)
    all_within("log-prob", found[0], judge(folder, pairs))
    assert found[1] == found[0]


def test_bf16_is_near(ranks: Any, tiny_checkpoint: Any) -> None:
    folder, pairs = tiny_checkpoint("tied"), pairs_of(4, 20)
    found, expected = ranks(1).run(score, folder, ParallelSection(), pairs, 40, True)[0], judge(folder, pairs)
    assert found != pytest.approx(expected, rel=1e-6), "it was not computed in bf16"
    assert found == pytest.approx(expected, rel=0.03)
