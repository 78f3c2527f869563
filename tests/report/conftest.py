"""Synthetic run directories in the layout of the product, with numbers that behave like the measured ones."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import Config
from megatron_tspin.config_source import dump_config
from megatron_tspin.records import (
    DecodingResult,
    Differences,
    Evaluation,
    MarginNoise,
    PrecisionNoise,
    Response,
    RolloutSummary,
)
from megatron_tspin.step_metrics import StepMetrics


@dataclass
class RunRecipe:
    """What to write; the defaults are a healthy, finished tspin run."""

    method: str = "tspin"
    iterations: int = 4
    """Planned iterations."""
    done: float = math.inf
    """Iterations trained so far; 1.5 stops in the middle of the second one."""
    steps: int = 12
    seed: int = 0
    scorer: bool = True
    accuracy: list[float] = field(default_factory=lambda: [0.05, 0.24, 0.33, 0.36, 0.38])
    ended: list[float] = field(default_factory=lambda: [0.82, 0.86, 0.9, 0.92, 0.93])
    passed_over: str | None = None
    """What most answers without an end go on after."""
    lengths: list[float] = field(default_factory=lambda: [40.0, 38.0, 36.0, 35.0, 34.0])
    annotated: list[float] = field(default_factory=lambda: [-60.0, -48.0, -41.0, -37.0, -35.0])
    """Log-prob of y under the policy after 0, 1, ... iterations."""
    synthetic: list[float] = field(default_factory=lambda: [-62.0, -55.0, -50.0, -47.0, -45.0])
    """Log-prob of fresh y'."""
    synthetic_fall: float = 18.0
    """How far y' sinks inside an iteration."""
    active: float = 0.6
    identical: float = 0.05
    empty: float = 0.0
    diagnostics: bool = False
    prompt: str = "Reverse the word: apple"
    response: str = "elppa"
    noise_share: float | None = None
    """Error of bf16 margins over their median of 2.0; None is an fp32 run."""
    drift_share: float = 0.01
    config: dict[str, Any] = field(default_factory=dict)


class RunBuilder:
    """Writes one run directory."""

    def __init__(self, folder: Path, recipe: RunRecipe) -> None:
        self.folder, self.recipe = folder, recipe
        self.noise = random.Random(recipe.seed)
        self.done = min(recipe.done, recipe.iterations)
        self.reference_based = recipe.method in ("spin", "tspin_ref")
        self.triplets = recipe.method in ("tspin", "tspin_ref")

    def build(self) -> Path:
        self._config()
        self._data()
        finished = math.floor(self.done)
        stages = ["tokenize", "convert"]
        for number in range(math.ceil(self.done)):
            self._rollout(number, stages)
            self._training(number)
            stages += [f"train_{number:03d}"] if number < finished else []
        if finished == self.recipe.iterations:
            self._evaluation(finished)
            stages += [f"rollout_{finished:03d}", "export"]
        for position, stage in enumerate(stages):
            self._stage(stage, position)
        return self.folder

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")

    def _config(self) -> None:
        tree: dict[str, Any] = {
            "run_dir": "runs/example",
            "model": {"hf_checkpoint": "checkpoints/toy"},
            "data": {"annotated": "data/train.jsonl", "held_out": "data/held_out.jsonl", "seq_length": 512},
            "objective": {"method": self.recipe.method, "alpha": 0.1},
            "optimizer": {"lr": 3e-4},
            "self_play": {"iterations": self.recipe.iterations},
            "evaluation": {"scorer": "scorer.py:exact" if self.recipe.scorer else None},
        }
        for name, value in self.recipe.config.items():
            section, leaf = name.split(".")
            tree.setdefault(section, {})[leaf] = value
        self._write("run.yaml", dump_config(Config.model_validate(tree)))

    def _data(self) -> None:
        lines = [
            {"id": f"h{i}", "prompt": self.recipe.prompt, "response": self.recipe.response, "record": {}}
            for i in range(5)
        ]
        self._write("data/held_out.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def _decoding(self, number: int, bonus: float) -> DecodingResult:
        accuracy = min(1.0, self.recipe.accuracy[number] + bonus)
        return DecodingResult(
            num_prompts=120,
            accuracy=accuracy if self.recipe.scorer else None,
            standard_error=math.sqrt(accuracy * (1 - accuracy) / 119) if self.recipe.scorer else None,
            ended_share=min(1.0, self.recipe.ended[number] + bonus / 4),
            mean_tokens=self.recipe.lengths[number] - 20 * bonus,
        )

    def _evaluation(self, number: int) -> None:
        record = Evaluation(
            iteration=number,
            greedy=self._decoding(number, 0.12),
            sampled=self._decoding(number, 0.0),
            log_prob_annotated=self.recipe.annotated[number],
            log_prob_sampled=self.recipe.synthetic[number],
            nll_per_token=-self.recipe.annotated[number] / 31,
        )
        self._write(f"evaluation/policy_{number:03d}.json", record.model_dump_json())
        answers = [
            Response(
                id=f"h{i}",
                response_ids=[5, 6, 7],
                token_log_probs=[-0.5, -1.0, -0.2],
                ended=number > 0,
                text=f"{self.recipe.response} ({number})".encode("utf-8", "replace").decode(),
            )
            for i in range(5)
        ]
        shards = {"shard_00000": answers[:2], "shard_00001": answers[2:]}
        for name, part in shards.items():
            self._write(f"evaluation/policy_{number:03d}/greedy/{name}.jsonl", "".join(item.line() for item in part))

    def _summary(self, number: int) -> str:
        return RolloutSummary(
            num_responses=256,
            ended_share=self.recipe.ended[number],
            empty_share=self.recipe.empty,
            identical_share=self.recipe.identical,
            mean_tokens=self.recipe.lengths[number],
            mean_log_prob=self.recipe.synthetic[number],
            passed_over=self.recipe.passed_over,
        ).model_dump_json()

    def _rollout(self, number: int, stages: list[str]) -> None:
        self._evaluation(number)
        if number == 0 and self.triplets:
            self._write("proto/summary.json", self._summary(0))
        if self.recipe.method != "sft":
            self._write(f"iteration_{number:03d}/synthetic/summary.json", self._summary(number))
        stages.append(f"rollout_{number:03d}")

    def _training(self, number: int) -> None:
        self._precision(number)
        share = min(1.0, self.done - number)
        steps = round(self.recipe.steps * share)
        lines = [self._step(number, step) for step in range(1, steps + 1)]
        self._write(f"iteration_{number:03d}/metrics.jsonl", "".join(line.line() for line in lines))

    def _precision(self, number: int) -> None:
        recipe, alpha = self.recipe, 0.1
        if recipe.noise_share is None:
            return

        def errors(size: float) -> Differences:
            return Differences(
                count=64, mean=-size / 4, standard_deviation=1.2 * size, mean_absolute=size, p95_absolute=2.5 * size,
                largest_absolute=4 * size, largest_id="7", per_token_rms=size / 5,
            )  # fmt: skip

        margin = MarginNoise(
            noise=errors(2.0 * recipe.noise_share), median_absolute=2.0, noise_share=recipe.noise_share
        )
        record = PrecisionNoise(
            iteration=number,
            precision="bf16 with fp32 masters, linear layers by torch",
            num_prompts=64,
            num_responses=192 if self.triplets and number else 128 if recipe.method != "sft" else 64,
            mean_tokens=31.0,
            log_prob=errors(2.0 * recipe.noise_share / alpha / 1.5),
            current_margin=margin if recipe.method != "sft" else None,
            historical_margin=margin if self.triplets and number else None,
            without_reference=self.reference_based,
            drift=errors(2.0 * recipe.drift_share / alpha) if recipe.method != "sft" else None,
            drift_share=recipe.drift_share if recipe.method != "sft" else None,
            no_drift=None if recipe.method != "sft" else "the method has no sampled answers",
            engine_drift=errors(0.1) if recipe.config.get("generation.engine") == "vllm" else None,
            seconds=3.5,
        )
        self._write(f"iteration_{number:03d}/precision.json", record.model_dump_json())

    def _step(self, number: int, step: int) -> StepMetrics:
        recipe, progress, noise = self.recipe, (step - 1) / self.recipe.steps, self.noise.gauss
        begin, end = recipe.annotated[number], recipe.annotated[number + 1]
        annotated = begin + (end - begin) * progress + noise(0, 0.6)
        synthetic = recipe.synthetic[number] - recipe.synthetic_fall * progress + noise(0, 0.8)
        proto = recipe.synthetic[0] - recipe.synthetic_fall * (number + progress) + noise(0, 0.8)
        has_pair = recipe.method != "sft"
        scale = 0.1
        references = (begin, recipe.synthetic[number]) if self.reference_based else (0.0, 0.0)
        rewards = (scale * (annotated - references[0]), scale * (synthetic - references[1]))
        margin = rewards[0] - rewards[1]
        loss = math.log1p(math.exp(-margin)) if has_pair else -annotated / 31
        return StepMetrics(
            iteration=number,
            step=step,
            loss=loss,
            learning_rate=3e-4 * (1 - progress),
            grad_norm=1.0,
            update_skipped=False,
            num_triplets=64,
            log_prob_annotated=annotated,
            log_prob_synthetic=synthetic if has_pair else None,
            log_prob_proto=proto if self.triplets else None,
            reward_annotated=rewards[0] if has_pair else None,
            reward_synthetic=rewards[1] if has_pair else None,
            reward_proto=scale * proto if self.triplets else None,
            tokens_annotated=31.0,
            tokens_synthetic=recipe.lengths[number] if has_pair else None,
            tokens_proto=recipe.lengths[0] if self.triplets else None,
            current_advantage=margin / scale if has_pair else None,
            historical_advantage=synthetic - proto if self.triplets else None,
            current_margin=margin if has_pair else None,
            active_share=max(0.0, min(1.0, recipe.active + noise(0, 0.02))) if has_pair else None,
            mean_slope=1 / (1 + math.exp(margin)) if has_pair else None,
            identical_share=recipe.identical if has_pair else None,
            tokens_per_second=5200 + noise(0, 90),
            packing_efficiency=0.93,
            prompt_share_saved=0.6 if self.triplets else 0.5 if has_pair else 0.0,
            **self._diagnostics(progress, has_pair),
            seconds=1.4 + noise(0, 0.05),
        )

    def _diagnostics(self, progress: float, has_pair: bool) -> dict[str, float | None]:
        """Entropy falls and agreement rises with training; None where nothing was measured or computed."""
        computed = {"annotated": True, "synthetic": has_pair, "proto": self.triplets}
        found: dict[str, float | None] = {}
        for role, known in computed.items():
            known = known and self.recipe.diagnostics
            found[f"entropy_{role}"] = 1.2 - 0.5 * progress if known else None
            found[f"top_{role}"] = 0.6 + 0.2 * progress if known else None
        return found

    def _stage(self, stage: str, position: int) -> None:
        kind = stage.split("_")[0]
        marker = {
            "stage": stage,
            "command": ["python", "-m", "megatron_tspin", kind],
            "inputs": {},
            "outputs": {},
            "started": f"2026-01-05T10:{position:02d}:00+00:00",
            "seconds": {"tokenize": 2.1, "convert": 6.5, "rollout": 88.0, "train": 61.0}.get(kind, 5.0) + position,
            "versions": {"megatron_tspin": "0.1.0", "torch": "2.13.0", "megatron-core": "0.16.1"},
        }
        self._write(f"stages/{stage}.json", json.dumps(marker))


@pytest.fixture
def spin_recipe() -> RunRecipe:
    """SPIN with the misalignment of the paper's Figure 3: fresh y' more probable than y from iteration 1 on."""
    return RunRecipe(
        method="spin",
        accuracy=[0.05, 0.1, 0.06, 0.14, 0.09],
        annotated=[-60.0, -58.0, -57.0, -56.0, -55.5],
        synthetic=[-62.0, -40.0, -37.0, -36.0, -36.0],
        synthetic_fall=14.0,
        seed=1,
    )


@pytest.fixture
def build_run(tmp_path: Path) -> Callable[..., Path]:
    """build_run("name", recipe): writes a run directory below tmp_path."""

    def build(name: str = "tspin-run", recipe: RunRecipe | None = None, **changes: Any) -> Path:
        recipe = recipe or RunRecipe(**changes)
        return RunBuilder(tmp_path / name, recipe).build()

    return build
