"""Runs the engines in turns, each in a process of its own."""

import math
import time
from multiprocessing.connection import Connection

from megatron_tspin.benchmark.answers.results import AnswerResult, EngineResult, Measurement
from megatron_tspin.benchmark.answers.settings import CONTINUOUS, AnswerSettings, Workload
from megatron_tspin.benchmark.child import Child, ChildError, threads_environment
from megatron_tspin.benchmark.machine import describe_machine
from megatron_tspin.log import get_logger

_CONTINUOUS_SECONDS = 300.0
"""transformers' continuous batching may not come to an end on a CPU."""
_RATE = "rate"

_log = get_logger(__name__)


def run_answer_benchmark(settings: AnswerSettings) -> AnswerResult:
    """Measures all engines on all workloads.

    An engine that cannot be loaded, fails or does not end is left out; the result says why.
    """
    began = time.monotonic()
    result = AnswerResult(settings, describe_machine())
    for workload in settings.workloads:
        for number in range(settings.rounds):
            for name in settings.engines:
                engine = result.engine(workload, name)
                if engine.absent is not None or (number and not _has_time(settings, began, engine)):
                    continue
                _measure(result, engine, workload, number)
    return result


def _has_time(settings: AnswerSettings, began: float, engine: EngineResult) -> bool:
    if settings.minutes is None:
        return True
    expected = engine.loading_seconds + max(each.seconds for each in engine.measurements)
    return time.monotonic() - began + expected < 60 * settings.minutes


def _measure(result: AnswerResult, engine: EngineResult, workload: Workload, number: int) -> None:
    settings = result.settings
    environment = threads_environment(settings.threads)
    began = time.monotonic()
    try:
        with Child(_serve, engine.name, settings, environment=environment) as child:
            rate: float = child.receive()
            engine.loading_seconds = time.monotonic() - began
            limit = _CONTINUOUS_SECONDS if engine.name == CONTINUOUS else math.inf
            found: Measurement = child.ask(workload, settings.seed + number, seconds=limit)
    except TimeoutError:
        engine.absent = f"did not end within {_CONTINUOUS_SECONDS:.0f} s"
    except ChildError as error:
        engine.absent = str(error)
    else:
        result.matmul_flops_per_second.append(rate)
        engine.measurements.append(found)
        _log.info("%s, %s: %d tokens in %.1f s", workload.name, engine.name, sum(found.tokens), found.seconds)


def _serve(connection: Connection, name: str, settings: AnswerSettings) -> None:
    """The life of an engine: loads, answers a little, then answers a workload."""
    from megatron_tspin.benchmark.answers.engines import make_engine
    from megatron_tspin.benchmark.memory import PeakMemory
    from megatron_tspin.benchmark.rates import matmul_rate
    from megatron_tspin.benchmark.stopwatch import timed

    engine = make_engine(name, settings)
    if name != CONTINUOUS:  # whose warm-up may last as long as its work
        engine.answer(settings.prompts[:2], Workload(2, 2, ends=True), settings.seed)
    connection.send((True, matmul_rate(bf16=False)))
    workload, seed = connection.recv()
    memory = PeakMemory()
    cpu_began = time.process_time()
    tokens, seconds = timed(lambda: engine.answer(settings.prompts[: workload.prompts], workload, seed))
    measured = Measurement(tokens, seconds, time.process_time() - cpu_began, memory.peak_mib(), memory.held_mib)
    connection.send((True, measured))
