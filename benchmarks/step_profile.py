"""Where the time of our own step goes: the self time of every operation, by the part of the model it belongs to.

    python benchmarks/step_profile.py --model CHECKPOINT --max-length 512 --triplets 4 --micro-batch-size 2

The options are those of `tspin bench step`; sides and rounds are not used.
"""

import argparse
import dataclasses
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_tspin.benchmark.child import Child, threads_environment
from megatron_tspin.benchmark.lengths import TokenTriplet, draw_lengths, draw_tokens
from megatron_tspin.benchmark.machine import describe_machine
from megatron_tspin.benchmark.settings import PACKED, StepSettings
from megatron_tspin.benchmark.side_process import make_side
from megatron_tspin.benchmark.tables import make_table, show
from megatron_tspin.benchmark.work import useful_flops
from megatron_tspin.cli.bench import add_step_arguments, step_settings
from megatron_tspin.errors import EXIT_OK, TspinError
from megatron_tspin.log import set_up_logging
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.storage import write_json

_WITHIN = {"_SequenceLogProbs": "head", "_SegmentAttention": "attention over the packed row", "_SwiGLU": "SwiGLU"}
"""Parts that are one autograd function, forward and backward."""
_MATMULS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::_scaled_mm"}
_LINEAR = "linear layers (matrix products)"
_LEADING = 6


@dataclass(frozen=True)
class Part:
    """A part of the step and its share of the time."""

    name: str
    seconds: float
    share: float


@dataclass(frozen=True)
class ProfileResult:
    """One profiled step.

    Attributes:
        seconds: Wall time of a step without the profiler.
        parts: Self time under the profiler, summed over operations, largest first.
        matmul_flops_per_second: Best rate of a matrix product in the same process.
        useful_flops: See `work.useful_flops`.
    """

    seconds: float
    parts: list[Part]
    matmul_flops_per_second: float
    useful_flops: float

    @property
    def share_of_peak(self) -> float:
        """Useful operations per second over the rate of matrix products."""
        return self.useful_flops / self.seconds / self.matmul_flops_per_second


def run_profile(settings: StepSettings) -> ProfileResult:
    """Profiles the packed side in a process of its own.

    Raises:
        ChildError: The process failed or died.
    """
    architecture = read_architecture(Path(settings.model))
    lengths = draw_lengths(settings.lengths, settings.triplets, settings.max_length, settings.seed)
    batch = draw_tokens(lengths, architecture.vocab_size, settings.seed)
    with Child(_serve_profile, settings, batch, environment=threads_environment(settings.threads)) as child:
        seconds, parts, rate = child.receive()
    return ProfileResult(seconds, parts, rate, useful_flops(lengths, architecture))


def _serve_profile(connection: Connection, settings: StepSettings, batch: Sequence[TokenTriplet]) -> None:
    from torch.profiler import ProfilerActivity, profile

    from megatron_tspin.benchmark.rates import matmul_rate
    from megatron_tspin.benchmark.stopwatch import timed

    side = make_side(PACKED, settings, batch)
    side.forward_backward()
    seconds = min(timed(side.forward_backward)[1] for _ in range(2))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        side.forward_backward()
    connection.send((True, (seconds, by_part(profiler.events()), matmul_rate(settings.bf16))))


def by_part(events: Iterable[Any]) -> list[Part]:
    """Sums the self time of torch's profiler events by part, the largest first; small operations are joined."""
    totals: dict[str, float] = defaultdict(float)
    for event in events:
        totals[_part_of(event)] += event.self_cpu_time_total / 1e6
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    named = [item for item in ordered if not item[0].startswith("aten::")]
    operations = [item for item in ordered if item[0].startswith("aten::")]
    named += operations[:_LEADING]
    named.append(("all other operations", sum(seconds for _, seconds in operations[_LEADING:])))
    whole = sum(totals.values())
    return [Part(name, seconds, seconds / whole) for name, seconds in sorted(named, key=lambda item: -item[1])]


def _part_of(event: Any) -> str:
    above = event
    while above is not None:
        for prefix, part in _WITHIN.items():
            if above.name.startswith(prefix):
                return part
        above = above.cpu_parent
    if event.name in _MATMULS:
        return _LINEAR
    return str(event.name) if event.name.startswith("aten::") else "autograd and Python"


def report_profile(settings: StepSettings, result: ProfileResult, folder: Path) -> None:
    """Prints a table and writes profile_<model>_<lengths>_<max length>.json."""
    model = Path(settings.model).name
    rows = ([part.name, f"{part.seconds:.2f}", f"{part.share:.1%}"] for part in result.parts)
    show(
        f"Packed step: {model}, {settings.triplets} triplets, {settings.lengths} up to {settings.max_length} tokens, "
        f"{settings.threads} threads: {result.seconds:.1f} s; useful operations run at {result.share_of_peak:.0%} of "
        f"the {result.matmul_flops_per_second / 1e9:.0f} GFLOP/s of a matrix product",
        make_table(("part", "seconds, profiled", "share"), rows),
    )
    tree = {"benchmark": "profile", "machine": describe_machine(), **dataclasses.asdict(result)}
    tree["settings"] = dataclasses.asdict(settings) | {"model": model}
    write_json(folder / f"profile_{model}_{settings.lengths}_{settings.max_length}.json", tree)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the profile; returns the exit code.

    Raises:
        SystemExit: It was refused or failed, with the message.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_arguments(parser)
    args = parser.parse_args(argv)
    set_up_logging()
    try:
        settings = step_settings(args)
        report_profile(settings, run_profile(settings), args.output)
    except TspinError as error:
        raise SystemExit(f"error: {error}") from error
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
