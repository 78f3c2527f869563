"""Peak memory of the head alone: full logits against ours, each in a process of its own."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_tspin.benchmark.child import Child, threads_environment
from megatron_tspin.benchmark.machine import describe_machine
from megatron_tspin.benchmark.tables import make_table, show
from megatron_tspin.config import ParallelSection
from megatron_tspin.storage import write_json

FULL = "full logits"
OURS = "ours"

_COLUMNS = ("vocabulary", "head", "peak MiB", "fp32 logits once, MiB", "seconds")


@dataclass(frozen=True)
class HeadSettings:
    """Sizes of the head: response tokens, width, vocabularies; and how it is run."""

    tokens: int = 2048
    hidden_size: int = 576
    vocabularies: tuple[int, ...] = (49152, 262144)
    threads: int = 1
    bf16: bool = False


@dataclass(frozen=True)
class HeadResult:
    """One head: peak memory above hidden states, weight and their gradients; seconds of a later pass; log-prob sum."""

    variant: str
    vocab_size: int
    peak_mib: float
    seconds: float
    log_prob: float


def run_head_benchmark(settings: HeadSettings) -> list[HeadResult]:
    """Measures both variants at each vocabulary, one process after another.

    Raises:
        ChildError: A process failed or died.
    """
    found: list[HeadResult] = []
    for vocab_size in settings.vocabularies:
        for variant in (FULL, OURS):
            environment = threads_environment(settings.threads)
            with Child(_serve_head, settings, variant, vocab_size, environment=environment) as child:
                found.append(child.receive())
    return found


def _serve_head(connection: Connection, settings: HeadSettings, variant: str, vocab_size: int) -> None:
    import torch

    from megatron_tspin.benchmark.alone import alone
    from megatron_tspin.benchmark.head_steps import full_logits_step, measure_head, own_step, random_inputs

    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    with alone(ParallelSection(cpu_threads=settings.threads), tokens_multiple=1) as topology:
        inputs = random_inputs(settings.tokens, settings.hidden_size, vocab_size, dtype)
        step = full_logits_step(inputs) if variant == FULL else own_step(inputs, topology.tp_group)
        cost = measure_head(step, seconds=0.0)
    connection.send((True, HeadResult(variant, vocab_size, cost.peak_mib, cost.timing.median, cost.log_prob)))


def report_heads(settings: HeadSettings, results: Sequence[HeadResult], folder: Path) -> None:
    """Prints a table and writes head_memory.json."""
    rows = [
        [
            str(item.vocab_size),
            item.variant,
            f"{item.peak_mib:.0f}",
            f"{settings.tokens * item.vocab_size * 4 / 2**20:.0f}",
            f"{item.seconds:.2f}",
        ]
        for item in results
    ]
    show(
        f"Head alone, forward and backward: {settings.tokens} response tokens, width {settings.hidden_size}, "
        f"{'bf16' if settings.bf16 else 'fp32'}; peak memory above weight, hidden states and their gradients",
        make_table(_COLUMNS, rows),
    )
    tree = {
        "benchmark": "head_memory",
        "machine": describe_machine(),
        "settings": dataclasses.asdict(settings),
        "heads": [dataclasses.asdict(item) for item in results],
    }
    write_json(folder / "head_memory.json", tree)
