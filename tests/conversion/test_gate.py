"""The gate passes what each family's default config means, and names the first layer of what it does not."""

import random
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import ParallelSection
from megatron_tspin.conversion.parity import Sentence
from megatron_tspin.errors import ParityError
from megatron_tspin.models.families.registry import FAMILIES
from megatron_tspin.records import Verification
from tests.rank_pool import in_layout

pytestmark = pytest.mark.exact

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
"""Nothing but sizes; all else is as transformers' class has it."""
MORE_SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def sentences() -> list[Sentence]:
    chance = random.Random(3)
    ids = [chance.randrange(64) for _ in range(90)]
    return [Sentence(str(cut), ids[:cut], ids[cut : cut + 20]) for cut in (1, 30, 70)]


@pytest.fixture(scope="module")
def default_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def make(family: str) -> Path:
        import torch
        import transformers

        folder: Path = tmp_path_factory.mktemp(family)
        sizes = {**SIZES, **MORE_SIZES.get(family, {})}
        if family == "gpt_neox":
            del sizes["num_key_value_heads"]
        torch.manual_seed(1)
        transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(family, **sizes)
        ).save_pretrained(folder)
        return folder

    return make


def passed(folder: Path, layout: ParallelSection, wrong_layer: int | None = None) -> Verification:
    """On ranks: through the gate, on request with a layer that scores keys in another way."""
    from dataclasses import replace

    from megatron_tspin.conversion.parity import check_parity
    from megatron_tspin.models.attention import CausalAttention
    from tests.generation.answers import load

    with in_layout(layout) as topology:
        model = load(folder, layout, topology)
        for module in model.modules():
            if isinstance(module, CausalAttention) and module.layer_number - 1 == wrong_layer:
                module.scores = replace(module.scores, scale=1.01 * module.scores.scale)
        return check_parity(model, topology, folder, sentences())


@pytest.mark.parametrize("family", FAMILIES)
def test_default_configs_pass(family: str, default_checkpoint: Any, ranks: Any) -> None:
    card = ranks(1).run(passed, default_checkpoint(family), ParallelSection())[0]
    assert card.holds and card.longest >= 256 and len(card.layers) == 6


@pytest.mark.parametrize(
    "layout",
    [{"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}, {"data_parallel_size": 2}],
    ids=str,
)
def test_the_first_layer_that_departs_is_named(layout: dict[str, int], default_checkpoint: Any, ranks: Any) -> None:
    folder, parallel = default_checkpoint("gemma3_text"), ParallelSection(**layout)
    assert len({card.longest for card in ranks(2).run(passed, folder, parallel)}) == 1
    with pytest.raises(ParityError, match="layer 4 is the first that departs, by .*; nothing was written"):
        ranks(2).run(passed, folder, parallel, 4)
