"""Entropy and top-1 agreement of a real step are those of transformers' distributions."""

from typing import Any

import pytest

from megatron_tspin.objective.roles import ROLES
from tests.rank_pool import in_layout
from tests.training.trajectory import _trainer, for_method, make_config, triplets_of

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "padded": {"training.layout": "padded"},
    "unshared": {"training.share_prompts": False, "training.row_capacity": 80},
    "tp2": {"parallel.tensor_model_parallel_size": 2},
    "pp2": {"parallel.pipeline_model_parallel_size": 2},
    "cp2": {"parallel.context_parallel_size": 2},
    "dp2": {"parallel.data_parallel_size": 2},
}
MEASURED = [f"{quantity}_{role}" for quantity in ("entropy", "top") for role in ROLES]


def answering(triplets: list[Any], config: Any) -> list[Any]:
    """The triplets with some tokens replaced by the policy's most probable one, so that top-1 agreement is not 0."""
    from dataclasses import replace

    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(config.model.hf_checkpoint, dtype=torch.float32).eval()
    changed = []
    for number, triplet in enumerate(triplets):
        responses = {role: list(response) for role, response in triplet.responses.items()}
        for role in list(responses)[: 1 + number % 3]:
            with torch.no_grad():
                responses[role][0] = int(model(torch.tensor([triplet.prompt])).logits[0, -1].argmax())
        changed.append(replace(triplet, responses=responses))
    return changed


def judge(triplets: list[Any], config: Any) -> dict[str, float]:
    """Means over the response tokens of each role, in float64."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(config.model.hf_checkpoint, dtype=torch.float64).eval()
    found = {}
    for role in triplets[0].responses:
        entropies, agreed = [], []
        for triplet in triplets:
            response = triplet.responses[role]
            with torch.no_grad():
                logits = model(torch.tensor([[*triplet.prompt, *response]])).logits[0, len(triplet.prompt) - 1 : -1]
            entropies.append(torch.distributions.Categorical(logits=logits).entropy())
            agreed.append(logits.argmax(dim=1) == torch.tensor(response))
        found[f"entropy_{role}"] = torch.cat(entropies).mean().item()
        found[f"top_{role}"] = torch.cat(agreed).double().mean().item()
    return found


def measured(config: Any, triplets: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics of a step with diagnostics, and of the same step without."""
    found = []
    with in_layout(config.parallel) as topology:
        for diagnostics in (True, False):
            training = config.training.model_copy(update={"diagnostics": diagnostics})
            trainer = _trainer(config.model_copy(update={"training": training}), topology)
            batch = for_method(triplets, trainer.roles, with_reference=False)
            found.append(trainer.train_step(batch).model_dump(exclude={"seconds", "tokens_per_second"}))
    return found[0], found[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diagnostics_of_a_step(layout: str, ranks: Any, tiny_checkpoint: Any) -> None:
    config = make_config(tiny_checkpoint("untied"), **LAYOUTS[layout])
    triplets = answering(triplets_of(0), config)
    expected = judge(triplets, config)
    assert all(0.05 < expected[f"top_{role}"] < 0.5 and expected[f"entropy_{role}"] > 1 for role in ROLES)
    for found, plain in ranks(config.parallel.world_size).run(measured, config, triplets):
        assert {name: found.pop(name) for name in MEASURED} == pytest.approx(expected, rel=1e-5)
        assert [plain.pop(name) for name in MEASURED] == [None] * len(MEASURED)
        assert found == plain, "measuring changes what is trained"


def test_roles_that_were_not_computed_have_none(ranks: Any, tiny_checkpoint: Any) -> None:
    config = make_config(tiny_checkpoint("tied"), **{"objective.method": "sft"})
    found, _ = ranks(1).run(measured, config, triplets_of(0))[0]
    known = [name for name in MEASURED if found[name] is not None]
    assert known == ["entropy_annotated", "top_annotated"]
