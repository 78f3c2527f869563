"""Our own training step, in one of its layouts, as `tspin train` runs it on one rank."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from megatron_tspin.benchmark.alone import alone
from megatron_tspin.benchmark.lengths import TokenTriplet
from megatron_tspin.benchmark.settings import ALPHA, BETA, PACKED, PADDED, StepSettings
from megatron_tspin.benchmark.side import LOSS
from megatron_tspin.config import Config
from megatron_tspin.config_source import load_config
from megatron_tspin.objective.batches import Triplet
from megatron_tspin.objective.roles import ROLES
from megatron_tspin.platform import device

_ITERATION = 1  # iteration 0 has a beta of its own


class OwnSide:
    """See the module; implements `side.Side`. The process has joined megatron-core's groups until it ends."""

    def __init__(self, name: str, settings: StepSettings, batch: Sequence[TokenTriplet], num_steps: int = 1) -> None:
        self._triplets = as_triplets(batch)
        self._open = ExitStack()
        self._trainer = _make_trainer(make_config(name, settings), self._open, num_steps)

    def zero_gradients(self) -> None:
        """See `side.Side`. The trainer does it at the start of each step, inside the timed part."""
        self._trainer.ddp.zero_grad_buffer()

    def forward_backward(self) -> dict[str, float]:
        """See `side.Side`."""
        from megatron_tspin.step_metrics import SUMMED

        sums = dict(zip(SUMMED, self._trainer.forward_backward(self._triplets).tolist(), strict=True))
        return {name: sums[name] for name in (LOSS, *(f"log_prob_{role}" for role in ROLES))}

    def train_step(self, triplets: list[Triplet]) -> None:
        """One step with its optimizer, of the number that this was made for."""
        self._trainer.train_step(triplets)

    def versions(self) -> dict[str, str]:
        """See `side.Side`."""
        import megatron.core

        import megatron_tspin

        return {
            "torch": torch.__version__,
            "megatron-core": megatron.core.__version__,
            "megatron_tspin": megatron_tspin.__version__,
        }


def as_triplets(batch: Sequence[TokenTriplet]) -> list[Triplet]:
    """The batch as the trainer takes it."""
    return [
        Triplet(str(number), triplet.prompt, dict(zip(ROLES, triplet.responses, strict=True)))
        for number, triplet in enumerate(batch)
    ]


def make_config(name: str, settings: StepSettings) -> Config:
    """The run that a side stands for."""
    whole = -(-settings.triplets // settings.micro_batch_size) * settings.micro_batch_size
    flags: dict[str, Any] = {
        "run_dir": "unused",
        "model.hf_checkpoint": settings.model,
        "data.annotated": "unused",
        "data.seq_length": max(settings.max_length, 8),
        "generation.max_new_tokens": 1,
        "objective.alpha": ALPHA,
        "objective.beta": BETA,
        "training.micro_batch_size": settings.micro_batch_size,
        "training.global_batch_size": whole,
        "precision.bf16": settings.bf16,
        "training.layout": "padded" if name == PADDED else "packed",
        "parallel.cpu_threads": settings.threads,
    }
    if name != PADDED:
        flags |= {"training.share_prompts": name == PACKED, "training.row_capacity": settings.row_capacity}
    return load_config(None, flags)


def _make_trainer(config: Config, still_open: ExitStack, num_steps: int) -> Any:
    """A trainer with the checkpoint's weights; `still_open` keeps this process's groups."""
    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.models.hf_config import read_architecture
    from megatron_tspin.models.provider import make_model_provider
    from megatron_tspin.training.loop import build_trainer

    topology = still_open.enter_context(alone(config.parallel, config.precision.tokens_multiple))
    architecture = read_architecture(Path(config.model.hf_checkpoint))
    model = make_model_provider(architecture, config.parallel, config.training, config.precision)()
    load_hf(model, topology)
    model.to(device())
    return build_trainer(config, _ITERATION, topology, model, num_steps)
