"""Tokens a second of our generation engine and of transformers, on the same shape and the same prompts."""

import random
from typing import Any

import torch

from megatron_tspin.benchmark.gpu_report.check import TIMES, Case, Figures, Meaning
from megatron_tspin.benchmark.gpu_report.policies import SMOLLM2, TINY, architecture, random_policy, topology
from megatron_tspin.benchmark.gpu_report.step import transformers_model
from megatron_tspin.benchmark.stopwatch import Timing, measure
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.platform import device

_PROMPTS, _NEW_TOKENS = 64, 128
_REDUCED_PROMPTS, _REDUCED_NEW_TOKENS = 2, 4
_PROMPT_TOKENS = (20, 60)
_SECONDS = 4.0
_REPEATS = 3

FIGURES = {
    "tokens_per_second": Meaning("1/s", "new tokens of the whole batch over the median time, prompts included"),
    **TIMES,
    "prompts": Meaning("", "prompts of the batch, of 20 to 60 random tokens"),
    "new_tokens": Meaning("", "greedy tokens of each prompt"),
}


def cases(reduced: bool) -> list[Case]:
    """Ours, then transformers."""
    return [
        Case("ours, bf16", lambda: _ours(reduced)),
        Case("transformers.generate, bf16, sdpa", lambda: _transformers(reduced)),
    ]


def _task(reduced: bool) -> tuple[Architecture, list[list[int]], int]:
    """The shape, the prompts and the number of new tokens."""
    shape = architecture(TINY if reduced else SMOLLM2)
    chance = random.Random(0)
    count, new_tokens = (_REDUCED_PROMPTS, _REDUCED_NEW_TOKENS) if reduced else (_PROMPTS, _NEW_TOKENS)
    lengths = [chance.randint(*_PROMPT_TOKENS) for _ in range(count)]
    return shape, [[chance.randrange(shape.vocab_size) for _ in range(length)] for length in lengths], new_tokens


def _ours(reduced: bool) -> Figures:
    from megatron_tspin.data.stops import Stops
    from megatron_tspin.generation.backends.backend import PromptRequest
    from megatron_tspin.generation.backends.cache_size import cache_size
    from megatron_tspin.generation.backends.engine import Engine
    from megatron_tspin.generation.sampling import Decoding

    shape, prompts, new_tokens = _task(reduced)
    policy = random_policy(shape, PrecisionSection(bf16=True)).eval()
    engine = Engine(policy, topology(), Stops(frozenset()), cache_size(policy, topology(), len(prompts), None))
    decoding = Decoding(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=new_tokens)
    requests = [PromptRequest(index, prompt, seed=index) for index, prompt in enumerate(prompts)]

    def answer() -> None:
        answers = [each for _, each in engine.answers(requests, decoding)]
        assert len(answers) == len(prompts) and all(len(each.ids) == new_tokens for each in answers)

    return _figures(measure(answer, _SECONDS, repeats=_REPEATS, warm_ups=0), len(prompts), new_tokens)


def _transformers(reduced: bool) -> Figures:
    shape, prompts, new_tokens = _task(reduced)
    topology()  # on a CPU: threads as ours has
    model: Any = transformers_model(shape).eval()
    model.generation_config.eos_token_id = None
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device())
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device())

    def answer() -> None:
        found = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
        )
        assert found.shape[1] == longest + new_tokens

    return _figures(measure(answer, _SECONDS, repeats=_REPEATS, warm_ups=0), len(prompts), new_tokens)


def _figures(timing: Timing, prompts: int, new_tokens: int) -> Figures:
    return {
        "tokens_per_second": prompts * new_tokens / timing.median,
        **timing.milliseconds(),
        "prompts": float(prompts),
        "new_tokens": float(new_tokens),
    }
