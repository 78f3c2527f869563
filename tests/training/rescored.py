"""Iterations in low precision to be rescored, and a judge of what rescoring says."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_tspin.config import Config, ParallelSection
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.data.indexed import write_documents
from megatron_tspin.records import PrecisionNoise, Response
from megatron_tspin.run_folder import TRAIN, RunFolder, document_stem
from tests.rank_pool import in_layout
from tests.training.triplet_files import FACTS, LENGTHS, document, expected

SHARD_SIZE = 3
ANSWER = -2.5
"""Log-prob of every token of y' as the shards have it."""
Build = Callable[..., Config]


def save_policy(folder: Path, checkpoint: Path, damage: float | None = None) -> None:
    """On a rank: converts a checkpoint; `damage` becomes one of its weights."""
    import torch

    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.checkpoint.store import save_checkpoint

    with in_layout(ParallelSection()) as topology, torch.no_grad():
        model = built(folder, ParallelSection(), PrecisionSection())
        load_hf(model, topology)
        if damage is not None:
            model.decoder.final_layernorm.weight[0] = damage
        save_checkpoint(checkpoint, model, topology)


def built(folder: Path, layout: ParallelSection, precision: PrecisionSection) -> Any:
    from megatron_tspin.config import TrainingSection
    from megatron_tspin.models.hf_config import read_architecture
    from megatron_tspin.models.provider import make_model_provider

    return make_model_provider(read_architecture(folder), layout, TrainingSection(), precision)()


def write_shards(folder: Path, policy: Path, alike: int = 0) -> None:
    """Answers of an engine; the first `alike` are y itself."""
    from megatron_tspin.storage import sha256_file, write_json

    responses = [expected(i, "annotated" if i < alike else "synthetic") for i in range(len(LENGTHS))]
    answers = [
        Response(id=f"ex-{i}", response_ids=ids, token_log_probs=[ANSWER] * len(ids), ended=True, text="")
        for i, ids in enumerate(responses)
    ]
    write_documents(document_stem(folder.parent, TRAIN, "synthetic"), responses, 101, FACTS)
    facts = {"checkpoint_sha256": sha256_file(policy / "manifest.json"), "shard_size": SHARD_SIZE}
    write_json(folder / "settings.json", facts)
    for number in range(0, len(answers), SHARD_SIZE):
        lines = "".join(answer.line() for answer in answers[number : number + SHARD_SIZE])
        (folder / f"shard_{number // SHARD_SIZE:05d}.jsonl").write_text(lines)


@dataclass
class Seen:
    """What a rank saw of a stage: how often each file was read for its tensors, and where the fp32 weights lay."""

    read: Counter[str] = field(default_factory=Counter)
    in_gradient_buffers: list[bool] = field(default_factory=list)


def train(config: Config, iteration: int, start: Path, save: Path) -> Seen:
    """On ranks: the stage."""
    from unittest.mock import patch

    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.planner import LoadItemType

    from megatron_tspin.training import rescoring, stages

    seen = Seen()
    read_data, in_fp32 = FileSystemReader.read_data, rescoring._in_fp32

    def counted(self: Any, plan: Any, planner: Any) -> Any:
        tensors = [item for item in plan.items if item.type == LoadItemType.TENSOR]
        seen.read.update({self.storage_data[item.storage_index].relative_path for item in tensors})
        return read_data(self, plan, planner)

    def built_in_fp32(trainer: Any) -> Any:
        policies = in_fp32(trainer)
        buffers = {p.main_grad.data_ptr() for chunk in trainer.chunks for p in chunk.module.parameters()}
        seen.in_gradient_buffers += [p.data_ptr() in buffers for policy in policies for p in policy.parameters()]
        return policies

    @contextmanager
    def joined(layout: ParallelSection, _: int, tokens_multiple: int) -> Iterator[Any]:
        with in_layout(layout) as topology:
            yield replace(topology, row_length_multiple=layout.row_length_multiple(tokens_multiple))

    with (
        patch.object(stages, "distributed", joined),
        patch.object(FileSystemReader, "read_data", counted),
        patch.object(rescoring, "_in_fp32", built_in_fp32),
    ):
        stages.train_run(config, iteration, start, save)
    return seen


def scores_at(folder: Path, precision: PrecisionSection, pairs: list[Any]) -> list[float]:
    """On a rank: log-probs by a model that never saw a checkpoint of ours."""
    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.objective.scoring import score_pairs

    with in_layout(ParallelSection()) as topology:
        model = built(folder, ParallelSection(), precision)
        load_hf(model, topology)
        return score_pairs(model, topology, pairs)


def record_of(config: Config, iteration: int = 1) -> PrecisionNoise:
    path = RunFolder(Path(config.run_dir)).precision(iteration)
    return PrecisionNoise.model_validate_json(path.read_text())


def run(ranks: Any, config: Config, policy: Path, iteration: int = 1) -> Any:
    save = Path(config.run_dir) / "checkpoint"
    return ranks(config.parallel.world_size).run(train, config, iteration, policy, save)


@dataclass(frozen=True)
class Judged:
    """Log-probs of one response after the other, at both precisions, by models that never saw our checkpoint."""

    roles: int
    exact: list[float]
    coarse: list[float]
    tokens: list[int]

    @property
    def errors(self) -> list[float]:
        return [coarse - exact for exact, coarse in zip(self.exact, self.coarse, strict=True)]

    def margins(self, values: list[float], first: int, second: int) -> list[float]:
        """Differences of two roles, a prompt each."""
        return [values[i + first] - values[i + second] for i in range(0, len(values), self.roles)]


def judge(ranks: Any, folder: Path, roles: tuple[str, ...]) -> Judged:
    pairs = [(document(i, 0, LENGTHS[i][0]), expected(i, role)) for i in range(len(LENGTHS)) for role in roles]
    exact, coarse = (ranks(1).run(scores_at, folder, PrecisionSection(bf16=bf16), pairs)[0] for bf16 in (False, True))
    return Judged(len(roles), exact, coarse, [len(response) for _, response in pairs])


def mean_absolute(values: list[float]) -> float:
    return statistics.fmean(map(abs, values))
