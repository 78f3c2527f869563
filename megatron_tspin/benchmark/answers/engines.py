"""The engines that a generation benchmark compares, each as one call."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_tspin.benchmark.answers.settings import CONTINUOUS, OURS, AnswerSettings, Workload


class AnswerEngine(Protocol):
    """An engine with its policy in memory."""

    def answer(self, prompts: Sequence[Sequence[int]], workload: Workload, seed: int) -> list[int]:
        """Answers prompts, sampled at temperature 1; returns the tokens of each answer."""
        ...


def make_engine(name: str, settings: AnswerSettings) -> AnswerEngine:
    """Loads one of `settings.ENGINES` in this process."""
    return _Ours(settings) if name == OURS else _Transformers(settings, continuous=name == CONTINUOUS)


class _Ours:
    """As `tspin generate` answers on one rank."""

    def __init__(self, settings: AnswerSettings) -> None:
        from megatron_tspin.benchmark.alone import alone
        from megatron_tspin.checkpoint.hf_weights import load_hf
        from megatron_tspin.config import ParallelSection, TrainingSection
        from megatron_tspin.config_precision import PrecisionSection
        from megatron_tspin.models.hf_config import read_architecture
        from megatron_tspin.models.provider import make_model_provider
        from megatron_tspin.platform import device

        layout = ParallelSection(cpu_threads=settings.threads)
        self._settings = settings
        self._open = ExitStack()
        self._topology = self._open.enter_context(alone(layout, 1))
        architecture = read_architecture(Path(settings.model))
        self._model = make_model_provider(architecture, layout, TrainingSection(), PrecisionSection())()
        load_hf(self._model, self._topology)
        self._model.to(device()).eval()

    def answer(self, prompts: Sequence[Sequence[int]], workload: Workload, seed: int) -> list[int]:
        """See `AnswerEngine`."""
        from megatron_tspin.data.stops import Stops
        from megatron_tspin.generation.backends.backend import PromptRequest
        from megatron_tspin.generation.backends.cache_size import cache_size
        from megatron_tspin.generation.backends.engine import Engine
        from megatron_tspin.generation.sampling import Decoding, answer_seed

        stops = Stops(frozenset(self._settings.stops if workload.ends else ()))
        size = cache_size(self._model, self._topology, workload.batch, None)
        engine = Engine(self._model, self._topology, stops, size)
        requests = [
            PromptRequest(index, ids, answer_seed(seed, "benchmark", str(index))) for index, ids in enumerate(prompts)
        ]
        decoding = Decoding(1.0, 1.0, 0, self._settings.new_tokens)
        answers = dict(engine.answers(requests, decoding))
        return [len(answers[index].ids) for index in range(len(prompts))]


class _Transformers:
    """Plain transformers."""

    def __init__(self, settings: AnswerSettings, continuous: bool) -> None:
        from transformers import AutoModelForCausalLM

        self._settings = settings
        self._continuous = continuous
        model: Any = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def answer(self, prompts: Sequence[Sequence[int]], workload: Workload, seed: int) -> list[int]:
        """See `AnswerEngine`."""
        torch.manual_seed(seed)
        stops = self._settings.stops if workload.ends else None
        how: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
        how |= {"eos_token_id": stops, "max_new_tokens": self._settings.new_tokens}
        if self._continuous:
            return self._generate_batch(prompts, how)
        self._model.generation_config.eos_token_id = None  # those of the workload alone
        counts: list[int] = []
        for start in range(0, len(prompts), workload.batch):
            counts += self._generate(prompts[start : start + workload.batch], how, stops or ())
        return counts

    @torch.no_grad()
    def _generate(self, prompts: Sequence[Sequence[int]], how: dict[str, Any], stops: Sequence[int]) -> list[int]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        place = self._model.device
        found = self._model.generate(ids.to(place), attention_mask=mask.to(place), **how)[:, longest:].tolist()
        return [next((n for n, token in enumerate(row, 1) if token in stops), len(row)) for row in found]

    def _generate_batch(self, prompts: Sequence[Sequence[int]], how: dict[str, Any]) -> list[int]:
        from transformers import GenerationConfig

        found = self._model.generate_batch(list(map(list, prompts)), generation_config=GenerationConfig(**how))
        return [len(each.generated_tokens) for each in found.values()]
