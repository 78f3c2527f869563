"""The step benchmark: all sides in one run, on the same weights and the same token ids, taking turns."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from megatron_tspin.benchmark.agreement import check_agreement
from megatron_tspin.benchmark.child import ChildError
from megatron_tspin.benchmark.lengths import draw_lengths, draw_tokens
from megatron_tspin.benchmark.machine import describe_machine
from megatron_tspin.benchmark.results import SideResult, StepResult
from megatron_tspin.benchmark.settings import PACKED, UNSHARED, StepSettings
from megatron_tspin.benchmark.side import SideMaker
from megatron_tspin.benchmark.side_process import SideProcess, make_side
from megatron_tspin.benchmark.work import predicted_flops, useful_flops
from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.objective.packing import Shape

_log = get_logger(__name__)
_BUSY = 0.5

Answer = TypeVar("Answer")


class _Bench:
    """The sides that are still there, and the result that grows."""

    def __init__(self, settings: StepSettings, makers: Mapping[str, SideMaker], open_processes: ExitStack) -> None:
        self._started = time.monotonic()
        self._makers, self._open = makers, open_processes
        self._processes: dict[str, SideProcess] = {}
        architecture = read_architecture(Path(settings.model))
        lengths = draw_lengths(settings.lengths, settings.triplets, settings.max_length, settings.seed)
        _check_rows(lengths, settings)
        self._batch = draw_tokens(lengths, architecture.vocab_size, settings.seed)
        self.result = _empty_result(settings, lengths, architecture)

    def load(self) -> None:
        """Starts the sides one after another; what cannot be loaded is left out."""
        for side in self.result.sides:
            _log.info("%s: loading", side.name)
            make = self._makers.get(side.name, make_side)
            process = self._open.enter_context(SideProcess(side.name, self.result.settings, self._batch, make))
            self._processes[side.name] = process
            loaded = self._unless_it_fails(side, process.loaded)
            if loaded is not None:
                side.held_mib, side.versions = loaded.held_mib, loaded.versions
                self.result.memory_method = loaded.memory_method

    def warm_up(self) -> None:
        """Runs each side once, untimed.

        Raises:
            ParityError: They do not compute the same.
        """
        for side, process in self._present():
            repetition = self._unless_it_fails(side, process.run)
            if repetition is not None:
                side.warm_up_seconds, side.sums = repetition.seconds, repetition.sums
                side.peak_mib.append(repetition.peak_mib)
                _log.info("%s: first step %.1f s", side.name, repetition.seconds)
        check_agreement([side for side, _ in self._present()], self.result.settings.bf16)

    def run_rounds(self) -> None:
        """Runs the sides in turn, as long as there is time for one more round."""
        longest = sum(side.warm_up_seconds or 0.0 for side, _ in self._present())
        for number in range(1, self.result.settings.rounds + 1):
            if number > 1 and self._no_time_for(longest):
                _log.info("time is up after %d of %d rounds", number - 1, self.result.settings.rounds)
                return
            started = time.monotonic()
            for side, process in self._present():
                self._run_once(side, process, number)
            longest = max(longest, time.monotonic() - started)

    def _run_once(self, side: SideResult, process: SideProcess, number: int) -> None:
        repetition = self._unless_it_fails(side, process.run)
        if repetition is None:
            return
        side.seconds.append(repetition.seconds)
        side.cpu_seconds.append(repetition.cpu_seconds)
        side.peak_mib.append(repetition.peak_mib)
        rate = self.result.settings.triplets / repetition.seconds
        _log.info("round %d, %s: %.1f s, %.3g triplets/s", number, side.name, repetition.seconds, rate)

    def measure_rate(self) -> None:
        """The machine's matrix products, in the process of any side."""
        for side, process in self._present():
            rate = self._unless_it_fails(side, process.matmul_rate)
            if rate is not None:
                self.result.matmul_flops_per_second.append(rate)
                return

    def _present(self) -> list[tuple[SideResult, SideProcess]]:
        return [(side, self._processes[side.name]) for side in self.result.sides if side.name in self._processes]

    def _unless_it_fails(self, side: SideResult, call: Callable[[], Answer]) -> Answer | None:
        """The answer of a side's process; None, and the side is left out from now on, where it fails."""
        try:
            return call()
        except ChildError as error:
            side.absent = str(error)
            side.seconds.clear()
            del self._processes[side.name]
            _log.warning("%s is left out: %s", side.name, error)
            return None

    def _no_time_for(self, seconds: float) -> bool:
        minutes = self.result.settings.minutes
        return minutes is not None and time.monotonic() - self._started + seconds > 60 * minutes


def _check_rows(shapes: list[Shape], settings: StepSettings) -> None:
    longest = max(shape.row_tokens(share_prompts=UNSHARED not in settings.sides) for shape in shapes)
    if longest > settings.row_capacity and {UNSHARED, PACKED} & set(settings.sides):
        raise InputError(f"--row-capacity {settings.row_capacity} is less than a triplet's {longest} tokens; raise it")


def run_step_benchmark(settings: StepSettings, makers: Mapping[str, SideMaker] | None = None) -> StepResult:
    """Runs the benchmark.

    Args:
        settings: What to run.
        makers: Of sides that this package does not know, by name.

    Raises:
        InputError: A triplet does not fit into a packed row.
        ParityError: The sides do not compute the same; nothing was timed.
    """
    with ExitStack() as open_processes:
        bench = _Bench(settings, makers or {}, open_processes)
        load = bench.result.machine["load_average_before"]
        if load > _BUSY:
            _log.warning("other processes keep %.1f cores busy (load average): timings will be noisy", load)
        bench.load()
        bench.warm_up()
        bench.measure_rate()
        bench.run_rounds()
        bench.measure_rate()
        return bench.result


def _empty_result(settings: StepSettings, lengths: list[Shape], architecture: Architecture) -> StepResult:
    return StepResult(
        settings=settings,
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        machine=describe_machine(),
        memory_method="",
        prompt_tokens=[item.prompt for item in lengths],
        response_tokens=[list(item.responses) for item in lengths],
        useful_flops=useful_flops(lengths, architecture),
        matmul_flops_per_second=[],
        sides=[SideResult(name, predicted_flops(name, lengths, architecture, settings)) for name in settings.sides],
    )
