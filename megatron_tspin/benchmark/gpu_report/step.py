"""Speed of a training step at Mistral-7B's layer shapes, in each number format, beside plain transformers."""

import gc
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from megatron_tspin.benchmark import rates
from megatron_tspin.benchmark.gpu_report.check import TIMES, Case, Figures, Meaning
from megatron_tspin.benchmark.gpu_report.formats import FORMATS, LOCAL_BF16, TRAINED
from megatron_tspin.benchmark.gpu_report.policies import (
    MISTRAL,
    TINY,
    architecture,
    parallel,
    random_policy,
    require,
    topology,
)
from megatron_tspin.benchmark.lengths import draw_lengths, draw_tokens, response_tokens
from megatron_tspin.benchmark.memory import PeakMemory
from megatron_tspin.benchmark.own_side import as_triplets, make_config
from megatron_tspin.benchmark.settings import PACKED, StepSettings
from megatron_tspin.benchmark.stopwatch import Timing, measure
from megatron_tspin.benchmark.work import useful_flops
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.sizes import num_parameters, parameters_per_layer
from megatron_tspin.platform import device, has_cuda

_LENGTHS = "ultrachat"
_SEED = 5
_MOST_LAYERS = 16
_CUDA_SPARE = 0.25  # of the memory, for what the estimate does not know
_FIXED_BYTES = 6 * 2**30  # CUDA, libraries, the head's tiles
_TRAINED_BYTES = 10  # a parameter: bf16, fp32 gradient, fp32 master
_HIDDEN_BYTES, _MLP_BYTES = 48, 10  # of activations, a token and layer, times width and MLP width
_TRANSFORMERS = {"transformers, checkpointing": (8, True), "transformers": (2, False)}
"""Triplets of a micro-batch, and whether its layers are computed again in backward."""

FIGURES = {
    "triplets_per_second": Meaning("1/s", "triplets of the global batch over the median time of a step"),
    "tokens_per_second": Meaning("1/s", "response tokens over the same time"),
    "tflops": Meaning(
        "TFLOP/s",
        "operations that the batch needs at least (no padding, prompts once, logits of response tokens only, nothing "
        "twice), a multiplication and its addition as two, over the same time",
    ),
    "share_of_bf16": Meaning("", "tflops over the rate of a bf16 product of 8192^3 (CPU: 512^3) in the same process"),
    "share_of_fp8": Meaning("", "the same with an FP8 product with fast accumulation; of FP8 formats alone"),
    "peak_gib": Meaning("GiB", "peak memory of a step, weights and gradients included, ours with fp32 masters too"),
    **TIMES,
    "shape": Meaning("", "whose layers, embedding and head they are"),
    "layers": Meaning("", "decoder layers, chosen by the memory of the device"),
    "parameters": Meaning("10^9", "parameters of the model"),
    "triplets": Meaning("", "of the global batch"),
    "micro_batch_size": Meaning("", "triplets of a micro-batch of transformers, halved until it fits"),
    "row_capacity": Meaning("tokens", "most tokens of our packed rows"),
    "longest": Meaning("tokens", "longest prompt with response of the batch"),
    "graphs": Meaning("", "graphs that torch.compile has compiled in the process up to here"),
}


@dataclass(frozen=True)
class _Sizes:
    shape: str
    lengths: tuple[int, ...]
    triplets: int
    row_capacity: int
    layers: int | None
    seconds: float


_FULL = _Sizes(MISTRAL, (2048, 8192), 8, 8192, None, 2.0)
REDUCED = _Sizes(TINY, (128,), 2, 384, 2, 0.1)


class Task:
    """What all sides do at a most length.

    Attributes:
        sizes: Of the report's form.
        shapes: Lengths of the batch.
        architecture: Of the policy.
        tokens: The batch.
        settings: Of our own side.
    """

    def __init__(self, sizes: _Sizes, length: int) -> None:
        self.sizes = sizes
        self.shapes = draw_lengths(_LENGTHS, sizes.triplets, length, _SEED)
        self.architecture = _architecture(sizes)
        self.tokens = draw_tokens(self.shapes, self.architecture.vocab_size, _SEED)
        self.settings = StepSettings(
            model=str(self.architecture.folder),
            sides=(PACKED,),
            lengths=_LENGTHS,
            max_length=length,
            triplets=sizes.triplets,
            micro_batch_size=1,
            row_capacity=_capacity(sizes, length),
            rounds=1,
            threads=parallel().cpu_threads,
            bf16=True,
            seed=_SEED,
        )

    def figures(self, timing: Timing, memory: PeakMemory) -> dict[str, float]:
        """Call it before the models are gone, and before anything else uses memory."""
        peak = (memory.held_mib + memory.peak_mib()) / 1024
        useful = useful_flops(self.shapes, self.architecture) / timing.median
        return {
            "triplets_per_second": len(self.shapes) / timing.median,
            "tokens_per_second": response_tokens(self.shapes) / timing.median,
            "tflops": useful / 1e12,
            "share_of_bf16": useful / rates.bf16_rate(),
            "peak_gib": peak,
            **timing.milliseconds(),
            **_model_figures(self.architecture),
            "triplets": float(len(self.shapes)),
            "longest": float(max(each.prompt + max(each.responses) for each in self.shapes)),
            "graphs": float(torch._dynamo.utils.counters["stats"]["unique_graphs"]),
        }


def cases(reduced: bool) -> list[Case]:
    """Each format, then transformers, at each most length."""
    sizes = REDUCED if reduced else _FULL
    own = {name: partial(_own, name) for name in TRAINED}
    peers = {name: partial(_transformers, *how) for name, how in _TRANSFORMERS.items()}
    runs = {LOCAL_BF16: own[LOCAL_BF16], **peers, **own}  # what matters most comes before time is up
    speeds = [
        Case(f"{name} | up to {length} tokens", partial(run, sizes, length))
        for length in sizes.lengths
        for name, run in runs.items()
    ]
    return [Case("model", partial(_model, sizes)), *speeds]


def _model(sizes: _Sizes) -> Figures:
    """What all of them train."""
    return {"shape": sizes.shape, **_model_figures(_architecture(sizes)), "triplets": float(sizes.triplets)}


def _model_figures(shape: Architecture) -> dict[str, float]:
    return {"layers": float(shape.num_layers), "parameters": num_parameters(shape) / 1e9}


def _capacity(sizes: _Sizes, length: int) -> int:
    """Rows hold the longest triplet."""
    shapes = draw_lengths(_LENGTHS, sizes.triplets, length, _SEED)
    longest, multiple = max(shape.row_tokens(share_prompts=True) for shape in shapes), topology().row_length_multiple
    return max(sizes.row_capacity, -(-longest // multiple) * multiple)


@cache
def _architecture(sizes: _Sizes) -> Architecture:
    row_tokens = max(_capacity(sizes, length) for length in sizes.lengths)
    return architecture(sizes.shape, sizes.layers or layers_that_fit(architecture(sizes.shape), row_tokens))


def layers_that_fit(shape: Architecture, row_tokens: int) -> int:
    """Layers that train comfortably on this device, by an estimate that is made once for all formats.

    Args:
        shape: Of one layer, and of embedding and head.
        row_tokens: Tokens of the longest row.
    """
    memory = torch.cuda.get_device_properties(0).total_memory * (1 - _CUDA_SPARE)
    ends = 2 * shape.vocab_size * shape.hidden_size * _TRAINED_BYTES
    activations = row_tokens * (_HIDDEN_BYTES * shape.hidden_size + _MLP_BYTES * shape.ffn_hidden_size)
    layer = parameters_per_layer(shape)[0] * _TRAINED_BYTES + activations
    return max(1, min(_MOST_LAYERS, int((memory - _FIXED_BYTES - ends) // layer)))


def _own(name: str, sizes: _Sizes, length: int) -> Figures:
    from megatron_tspin.training.loop import build_trainer

    precision = FORMATS[name]
    require(precision)
    task = Task(sizes, length)
    config = make_config(PACKED, task.settings).model_copy(update={"precision": precision})
    policy = random_policy(task.architecture, precision, config.training)
    trainer, batch = build_trainer(config, 1, topology(), policy, num_steps=1), as_triplets(task.tokens)
    memory = PeakMemory()
    timing = measure(lambda: trainer.forward_backward(batch), sizes.seconds)
    found = task.figures(timing, memory)
    if precision.fp8 is not None:
        found["share_of_fp8"] = 1e12 * found["tflops"] / rates.fp8_rate()
    return {**found, "row_capacity": float(task.settings.row_capacity)}


def _transformers(micro_batch_size: int, checkpointing: bool, sizes: _Sizes, length: int) -> Figures:
    """Rows of all roles padded to the longest of their micro-batch, full logits."""
    micro_batch_size, task = min(micro_batch_size, sizes.triplets), Task(sizes, length)
    while True:
        try:
            found = _transformers_once(micro_batch_size, checkpointing, task)
            return {**found, "micro_batch_size": float(micro_batch_size)}
        except torch.OutOfMemoryError:
            if micro_batch_size == 1:
                raise
        micro_batch_size //= 2
        gc.collect()
        torch.cuda.empty_cache()


def _transformers_once(micro_batch_size: int, checkpointing: bool, task: Task) -> dict[str, float]:
    from megatron_tspin.benchmark.transformers_side import TransformersSide

    model = transformers_model(task.architecture).train()
    side = TransformersSide(task.settings, task.tokens, micro_batch_size, checkpointing, model)
    memory = PeakMemory()
    timing = measure(side.forward_backward, task.sizes.seconds, prepare=side.zero_gradients, warm_ups=0)
    return task.figures(timing, memory)


def transformers_model(shape: Architecture) -> Any:
    """Transformers' model of an architecture: bf16, on this device, its own random weights, fused attention."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(shape.folder, local_files_only=True)
    torch.manual_seed(0)
    with device() if has_cuda() else nullcontext():
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return made.to(device())
