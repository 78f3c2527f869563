"""Answers of a tiny policy on ranks, under whatever layout and batch size, and by transformers as the judge."""

import random
from pathlib import Path
from typing import Any

from megatron_tspin.config import ParallelSection
from megatron_tspin.config_precision import PrecisionSection
from tests.rank_pool import in_layout

STOPS = (1, 17, 60)
"""Ids at which answers end."""
NEW_TOKENS = 24
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": NEW_TOKENS}


def prompts_of(count: int, vocabulary: int = 101) -> list[list[int]]:
    """Random prompts of 1 to 20 tokens."""
    chance = random.Random(7)
    return [[chance.randrange(3, vocabulary) for _ in range(chance.randint(1, 20))] for _ in range(count)]


def load(folder: Path, layout: ParallelSection, topology: Any) -> Any:
    """The HF checkpoint as this rank's part of the policy."""
    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.config import TrainingSection
    from megatron_tspin.models.hf_config import read_architecture
    from megatron_tspin.models.provider import make_model_provider

    provider = make_model_provider(read_architecture(folder), layout, TrainingSection(), PrecisionSection())
    model = provider(pre_process=topology.is_first_pipeline_stage, post_process=topology.is_last_pipeline_stage)
    load_hf(model, topology)
    return model.eval()


def run_engine(
    model: Any,
    topology: Any,
    prompts: list[list[int]],
    settings: dict[str, Any] | None = None,
    slots: int = 5,
    blocks: int = 200,
    lag: int | None = None,
) -> list[Any]:
    """On ranks: the answers of our engine, in the order of the prompts."""
    from megatron_tspin.data.stops import Stops
    from megatron_tspin.generation.backends.backend import PromptRequest
    from megatron_tspin.generation.backends.cache_size import CacheSize
    from megatron_tspin.generation.backends.engine import Engine
    from megatron_tspin.generation.sampling import Decoding, answer_seed

    decoding = Decoding(**{**PLAIN, **(settings or {})})
    requests = [PromptRequest(7 * i, ids, answer_seed(1, "test", str(i))) for i, ids in enumerate(prompts)]
    engine = Engine(model, topology, Stops(frozenset(STOPS)), CacheSize(slots, blocks), lag)
    found = list(engine.answers(requests, decoding))
    assert sorted(index for index, _ in found) == [request.index for request in requests], "each once"
    return [answer for _, answer in sorted(found, key=lambda pair: pair[0])]


def answer(folder: Path, layout: ParallelSection, slots: int, settings: dict[str, Any], lag: int = 0) -> list[Any]:
    """On ranks: the answers to `prompts_of(13)`, as (ids, ended, log-probs, log-probs as scored afterwards)."""
    from megatron_tspin.objective.scoring import score_pairs

    prompts = prompts_of(13)
    with in_layout(layout) as topology:
        model = load(folder, layout, topology)
        answers = run_engine(model, topology, prompts, settings, slots, lag=lag)
        scored = score_pairs(model, topology, [(p, a.ids) for p, a in zip(prompts, answers, strict=True)])
        return [(a.ids, a.ended, a.log_probs, score) for a, score in zip(answers, scored, strict=True)]


def greedy_by_transformers(folder: Path, prompts: list[list[int]] | None = None) -> list[list[int]]:
    """The judge; of `prompts_of(13)`, or others."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in prompts or prompts_of(13):
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=list(STOPS), pad_token_id=0)
        found.append(out[0, len(prompt) :].tolist())
    return found
