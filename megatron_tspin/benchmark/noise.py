"""What each number format does to the log-probs of a checkpoint's own answers, side by side in one process."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_tspin.benchmark.alone import alone
from megatron_tspin.benchmark.gpu_report.formats import FORMATS, LOCAL_FP32
from megatron_tspin.benchmark.machine import describe_machine
from megatron_tspin.benchmark.stopwatch import timed
from megatron_tspin.benchmark.tables import ABSENT, make_table, show
from megatron_tspin.config import ParallelSection, TrainingSection
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.conversion.parity import Sentence
from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger
from megatron_tspin.platform import has_cuda
from megatron_tspin.records import Differences
from megatron_tspin.storage import write_json
from megatron_tspin.training.precision_noise import differences

_log = get_logger(__name__)
_EDGES = "FP8 torch tensorwise, 1 + 1 layers bf16"
_REPEATS = 2
_COLUMNS = ("format", "mean", "mean size", "95 %", "largest", "a token", "seconds")

NOISE_FORMATS: Mapping[str, PrecisionSection] = {
    # The formats of output gradients show in backward only.
    **{name: precision for name, precision in FORMATS.items() if precision.fp8 != "e4m3"},
    _EDGES: PrecisionSection(bf16=True, fp8="hybrid", num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1),
}


@dataclass(frozen=True)
class FormatNoise:
    """One format.

    Attributes:
        name: As in the table.
        noise: Log-probs in this format minus those in fp32; None where it was not measured.
        seconds: Of scoring all responses, the median of some passes after a first one.
        absent: Why it was not measured.
    """

    name: str
    noise: Differences | None
    seconds: float | None
    absent: str | None = None


def measure_formats(
    hf_checkpoint: Path,
    sentences: Sequence[Sentence],
    threads: int,
    formats: Mapping[str, PrecisionSection] = NOISE_FORMATS,
) -> list[FormatNoise]:
    """Scores the responses in fp32 and in every format that this machine can compute.

    Args:
        hf_checkpoint: The policy.
        sentences: Prompts and responses, cut to the policy's positions.
        threads: Of torch, on a CPU.
        formats: By name; fp32 is always scored, first.
    """
    exact, seconds = _score(hf_checkpoint, sentences, threads, PrecisionSection())
    found = [FormatNoise(LOCAL_FP32, None, seconds)]
    for name, precision in formats.items():
        if name == LOCAL_FP32:
            continue
        try:
            values, seconds = _score(hf_checkpoint, sentences, threads, precision)
        except InputError as error:
            found.append(FormatNoise(name, None, None, str(error)))
            continue
        _log.info("%s: %.1f s", name, seconds)
        tokens = np.array([float(len(sentence.response_ids)) for sentence in sentences])
        texts = [sentence.text for sentence in sentences]
        found.append(FormatNoise(name, differences(np.array(values), np.array(exact), tokens, texts), seconds))
    return found


def _score(
    hf_checkpoint: Path, sentences: Sequence[Sentence], threads: int, precision: PrecisionSection
) -> tuple[list[float], float]:
    """Log-probs of all responses, and the seconds that a pass takes."""
    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.models.build import build_policy
    from megatron_tspin.models.hf_config import read_architecture
    from megatron_tspin.objective.scoring import score_pairs

    layout = ParallelSection(cpu_threads=threads)
    pairs = [(sentence.prompt_ids, sentence.response_ids) for sentence in sentences]
    with alone(layout, precision.tokens_multiple) as topology:
        policy = build_policy(read_architecture(hf_checkpoint), layout, TrainingSection(), precision, topology)
        load_hf(policy, topology)
        run = partial(score_pairs, policy, topology, pairs)
        return run(), statistics.median(timed(run)[1] for _ in range(_REPEATS))


def report_formats(
    hf_checkpoint: Path, sentences: Sequence[Sentence], threads: int, results: Sequence[FormatNoise], folder: Path
) -> Path:
    """Writes `noise_<checkpoint>.json` and prints the table; returns the file."""
    target = folder / f"noise_{hf_checkpoint.name}.json"
    tokens = sum(len(sentence.response_ids) for sentence in sentences)
    tree = {
        "benchmark": "log_prob_noise",
        "model": hf_checkpoint.name,
        "responses": len(sentences),
        "response_tokens": tokens,
        "threads": threads,
        "machine": describe_machine() | {"device": torch.cuda.get_device_name() if has_cuda() else "cpu"},
        "unit": "nats; seconds of scoring all responses",
        "formats": [
            {**dataclasses.asdict(each), "noise": each.noise.model_dump() if each.noise is not None else None}
            for each in results
        ],
    }
    write_json(target, tree)
    show(
        f"{hf_checkpoint.name}: {len(sentences)} responses of {tokens} tokens; log-probs of whole responses in each "
        "format minus those in fp32, in nats",
        make_table(_COLUMNS, ([each.name, *_row(each)] for each in results)),
        *dict.fromkeys(f"not measured: {each.absent}" for each in results if each.absent),
    )
    _log.info("results: %s", target)
    return target


def _row(each: FormatNoise) -> list[str]:
    seconds = ABSENT if each.seconds is None else f"{each.seconds:.1f}"
    if each.noise is None:
        return [*[ABSENT] * 5, seconds]
    noise = each.noise
    sizes = (noise.mean, noise.mean_absolute, noise.p95_absolute, noise.largest_absolute, noise.per_token_rms)
    return [*(f"{value:.2g}" for value in sizes), seconds]
