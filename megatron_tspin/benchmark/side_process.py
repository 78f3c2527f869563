"""Each side in a process of its own, told to run when it is its turn, so that no two sides compute at the same time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from megatron_tspin.benchmark.child import Child, threads_environment
from megatron_tspin.benchmark.lengths import TokenTriplet
from megatron_tspin.benchmark.settings import OWN_SIDES, RECIPE, StepSettings
from megatron_tspin.benchmark.side import Side, SideMaker

_RUN = "run"
_RATE = "rate"


@dataclass(frozen=True)
class Loaded:
    """What a side says once it is loaded: what the process holds (weights, gradients, libraries), and versions."""

    held_mib: float
    memory_method: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Repetition:
    """One forward and backward pass over the global batch: time, peak memory above what was held, and its sums."""

    seconds: float
    cpu_seconds: float
    peak_mib: float
    sums: dict[str, float]


class SideProcess(Child):
    """The process of a side."""

    def __init__(self, name: str, settings: StepSettings, batch: Sequence[TokenTriplet], make: SideMaker) -> None:
        environment = threads_environment(settings.threads)
        super().__init__(_serve_side, name, settings, list(batch), make, environment=environment)

    def loaded(self) -> Loaded:
        """Waits until the side is loaded; ask once."""
        answer: Loaded = self.receive()
        return answer

    def run(self) -> Repetition:
        """One repetition."""
        answer: Repetition = self.ask(_RUN)
        return answer

    def matmul_rate(self) -> float:
        """See `rates.matmul_rate`."""
        answer: float = self.ask(_RATE)
        return answer


def make_side(name: str, settings: StepSettings, batch: Sequence[TokenTriplet]) -> Side:
    """Loads one of `settings.SIDES`."""
    if name in OWN_SIDES:
        from megatron_tspin.benchmark.own_side import OwnSide

        return OwnSide(name, settings, batch)
    from megatron_tspin.benchmark.transformers_side import TransformersSide

    return TransformersSide(settings, batch, settings.micro_batch_of(name), checkpointing=name == RECIPE)


def _serve_side(
    connection: Connection, name: str, settings: StepSettings, batch: Sequence[TokenTriplet], make: SideMaker
) -> None:
    from megatron_tspin.benchmark.memory import PeakMemory
    from megatron_tspin.benchmark.rates import matmul_rate
    from megatron_tspin.benchmark.stopwatch import timed
    from megatron_tspin.platform import has_cuda

    side = make(name, settings, batch)
    side.zero_gradients()
    memory = PeakMemory()

    def repeat() -> Repetition:
        if has_cuda():  # asking the device for memory takes time, and the last repetition gave it all back
            side.forward_backward()
        side.zero_gradients()
        memory.reset()
        cpu_started = time.process_time()
        sums, seconds = timed(side.forward_backward)
        cpu_seconds, peak = time.process_time() - cpu_started, memory.peak_mib()
        memory.release()
        return Repetition(seconds, cpu_seconds, peak, sums)

    connection.send((True, Loaded(memory.held_mib, memory.method, side.versions())))
    while True:
        (word,) = connection.recv()
        connection.send((True, matmul_rate(settings.bf16) if word == _RATE else repeat()))
