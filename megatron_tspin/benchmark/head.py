"""Peak memory of the head alone: full logits against ours, each in a process of its own."""

import dataclasses
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_tspin.benchmark.machine import describe_machine
from megatron_tspin.benchmark.worker import Child, prepare_threads
from megatron_tspin.storage import write_json

FULL = "full logits"
OURS = "ours"
VOCABULARIES = (49152, 262144)

_TOKENS_PER_RESPONSE = 64


@dataclass(frozen=True)
class HeadSettings:
    """Sizes of the head: response tokens, width, vocabularies; and how it is run."""

    tokens: int = 2048
    hidden_size: int = 576
    vocabularies: tuple[int, ...] = VOCABULARIES
    threads: int = 1
    bf16: bool = False


@dataclass(frozen=True)
class HeadResult:
    """One head: peak memory above hidden states, weight and their gradients; seconds of a second pass; log-prob sum."""

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
            with Child(_serve_head, settings, variant, vocab_size) as child:
                found.append(child.ask())
    return found


def _serve_head(connection: Connection, settings: HeadSettings, variant: str, vocab_size: int) -> None:
    prepare_threads(settings.threads)
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    from megatron_tspin.benchmark.memory import PeakMemory
    from megatron_tspin.benchmark.timing import timed
    from megatron_tspin.platform import backend

    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    hidden, weight, token_ids = head_inputs(settings.tokens, settings.hidden_size, vocab_size, dtype)
    if variant == FULL:
        step = full_logits_step(hidden, weight, token_ids)
    else:
        dist.init_process_group(backend(), store=HashStore(), rank=0, world_size=1)
        step = own_step(hidden, weight, token_ids, dist.group.WORLD)
    memory = PeakMemory()
    log_prob = step()
    peak = memory.peak_mib()
    connection.send((True, HeadResult(variant, vocab_size, peak, timed(step)[1].seconds, log_prob)))


def head_inputs(tokens: int, hidden_size: int, vocab_size: int, dtype: Any) -> tuple[Any, Any, Any]:
    """Random hidden states [tokens, h] and weight [vocab, h], both zero gradients in place, and token ids [tokens].

    The variance of a hidden state times a row of the weight is 1 / h.
    """
    import torch

    from megatron_tspin.platform import device

    generator = torch.Generator(device()).manual_seed(0)
    hidden, weight = (
        torch.randn(size, hidden_size, generator=generator, device=device()).div_(hidden_size**0.5).to(dtype)
        for size in (tokens, vocab_size)
    )
    token_ids = torch.randint(0, vocab_size, (tokens,), generator=generator, device=device())
    for tensor in (hidden, weight):
        tensor.requires_grad_()
        tensor.grad = torch.zeros_like(tensor).fill_(0)  # a training step adds to gradients that are there
    return hidden, weight, token_ids


def full_logits_step(hidden: Any, weight: Any, token_ids: Any) -> Callable[[], float]:
    """Linear, log-softmax in fp32, gather: what transformers and TRL run."""
    import torch

    def step() -> float:
        logits = torch.nn.functional.linear(hidden, weight).float()
        total = logits.log_softmax(dim=-1).gather(1, token_ids[:, None]).sum()
        torch.autograd.backward(total)
        return total.detach().item()

    return step


def own_step(hidden: Any, weight: Any, token_ids: Any, group: Any) -> Callable[[], float]:
    """`models.head` in a group of this process alone, with the gradient buffer that megatron-core's DDP makes."""
    import torch

    from megatron_tspin.models.head import ResponseTargets, VocabularyShard, sequence_log_probs

    vocab_size, count = weight.shape[0], len(token_ids)
    shard = VocabularyShard(first=0, size=vocab_size, valid=vocab_size, group=group)
    positions = torch.arange(count, device=token_ids.device)
    owners = positions // _TOKENS_PER_RESPONSE
    targets = ResponseTargets(positions, token_ids, owners, int(owners.max()) + 1)
    weight.main_grad, weight.grad = weight.grad.float(), None

    def step() -> float:
        total = sequence_log_probs(hidden, weight, targets, shard).sum()
        torch.autograd.backward(total)
        weight.grad = None  # megatron-core's hook drops it: the gradient is in main_grad
        return total.detach().item()

    return step


def report_heads(settings: HeadSettings, results: Iterable[HeadResult], folder: Path) -> None:
    """Prints a table and writes head_memory.json."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    found = list(results)
    console = Console(file=sys.stdout, highlight=False)
    title = f"Head alone, forward and backward: {settings.tokens} response tokens, width {settings.hidden_size}, "
    title += f"{'bf16' if settings.bf16 else 'fp32'}; peak memory above weight, hidden states and their gradients"
    console.print(title, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("vocabulary", "head", "peak MiB", "fp32 logits once, MiB", "seconds"):
        table.add_column(name, justify="left" if name == "head" else "right")
    for item in found:
        logits = settings.tokens * item.vocab_size * 4 / 2**20
        table.add_row(
            str(item.vocab_size), item.variant, f"{item.peak_mib:.0f}", f"{logits:.0f}", f"{item.seconds:.2f}"
        )
    console.print(table)
    tree = {
        "benchmark": "head_memory",
        "machine": describe_machine(),
        "settings": dataclasses.asdict(settings),
        "heads": [dataclasses.asdict(item) for item in found],
    }
    write_json(folder / "head_memory.json", tree)
