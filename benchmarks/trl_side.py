"""`tspin bench step` with one more side: TRL's own training step on the same triplets.

    python benchmarks/trl_side.py --model CHECKPOINT --sides transformers trl padded packed --trl-path DIR

TPOTrainer (Triple Preference Optimization) is the TRL trainer that runs three responses of a prompt and no reference
model, so its rows are exactly ours: `chosen` is y, `rejected` y', `reference` y0. Its loss differs from T-SPIN's in the
last few operations on one number a response. It is fed token ids through its own data collator and timed in its own
`training_step`, which also computes the metrics that it logs. Gradient checkpointing and bf16 autocast, TRL's defaults,
are off: no other side recomputes activations, and the weights have the type that the benchmark asks for.
"""

import argparse
import importlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tspin.benchmark.lengths import TokenTriplet
from megatron_tspin.benchmark.settings import ALPHA, BETA, SIDES, StepSettings
from megatron_tspin.cli.bench import add_step_arguments, run_step
from megatron_tspin.errors import InputError, TspinError
from megatron_tspin.log import set_up_logging

TRL = "trl"
_LOGGED = {"logps/chosen": "log_prob_annotated", "logps/rejected": "log_prob_synthetic"}

# No torch up here: a side's process imports this file before its threads are limited.


class TrlSide:
    """See the module; implements `side.Side`."""

    def __init__(self, settings: StepSettings, batch: Sequence[TokenTriplet]) -> None:
        self._version = _import("trl").__version__
        self._trainer = _make_trainer(settings)
        size = settings.micro_batch_size
        self._sizes = [len(batch[start : start + size]) for start in range(0, len(batch), size)]
        self._micro_batches = [
            self._trainer.data_collator([_example(triplet) for triplet in batch[start : start + size]])
            for start in range(0, len(batch), size)
        ]
        self._trainer.current_gradient_accumulation_steps = len(self._micro_batches)  # `train` would set it

    def zero_gradients(self) -> None:
        """See `side.Side`."""
        from megatron_tspin.benchmark.transformers_side import zero_gradients

        zero_gradients(self._trainer.model)

    def forward_backward(self) -> dict[str, float]:
        """See `side.Side`; TRL has its own loss, and logs no log-prob of the third response."""
        logged = self._trainer._metrics["train"]
        logged.clear()
        for inputs in self._micro_batches:
            self._trainer.training_step(self._trainer.model, dict(inputs))
        return {
            ours: sum(mean * size for mean, size in zip(logged[theirs], self._sizes, strict=True))
            for theirs, ours in _LOGGED.items()
        }

    def versions(self) -> dict[str, str]:
        """See `side.Side`."""
        import torch
        import transformers

        return {"torch": torch.__version__, "transformers": transformers.__version__, "trl": self._version}


def make_trl_side(trl_path: Path | None, _: str, settings: StepSettings, batch: Sequence[TokenTriplet]) -> TrlSide:
    """Loads the side.

    Raises:
        InputError: TRL, or something that it needs, is not installed.
    """
    if trl_path is not None:
        # Last, so that torch and transformers stay those of the other sides; and before transformers is imported,
        # which looks for accelerate only then.
        sys.path.append(str(trl_path))
    return TrlSide(settings, batch)


def _import(name: str) -> Any:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"TRL does not start: {error}; pip install trl, or name its folder with --trl-path") from error


def _make_trainer(settings: StepSettings) -> Any:
    """TRL's trainer around the same weights."""
    tpo, datasets = _import("trl.experimental.tpo"), _import("datasets")
    import transformers

    from megatron_tspin.benchmark.transformers_side import load_model
    from megatron_tspin.platform import has_cuda

    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's settings against newer transformers
    folder = tempfile.mkdtemp(prefix="tspin_trl_")
    os.rmdir(folder)  # a name that nobody has; nothing is written there
    arguments = tpo.TPOConfig(
        output_dir=folder,
        per_device_train_batch_size=settings.micro_batch_size,
        beta=ALPHA,
        tpo_alpha=BETA,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not has_cuda(),
        max_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    return tpo.TPOTrainer(
        model=load_model(settings),
        args=arguments,
        train_dataset=datasets.IterableDataset.from_generator(_texts),
        processing_class=transformers.AutoTokenizer.from_pretrained(settings.model),
    )


def _texts() -> Iterator[dict[str, str]]:
    """A dataset, because the trainer wants one; nothing of it is run."""
    yield {"prompt": "a", "chosen": "b", "rejected": "c", "reference": "d"}


def _example(triplet: TokenTriplet) -> dict[str, list[int]]:
    """A triplet as TPO's data collator takes it."""
    names = ("chosen_ids", "rejected_ids", "reference_ids")
    return {"prompt_ids": triplet.prompt, **dict(zip(names, triplet.responses, strict=True))}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code.

    Raises:
        SystemExit: It was refused or failed, with the message.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_arguments(parser, [*SIDES, TRL])
    parser.add_argument("--trl-path", type=Path, metavar="DIR", help="folder with TRL, if the environment has none")
    args = parser.parse_args(argv)
    args.sides = args.sides or [*SIDES, TRL]
    set_up_logging()
    try:
        return run_step(args, {TRL: partial(make_trl_side, args.trl_path)})
    except TspinError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
