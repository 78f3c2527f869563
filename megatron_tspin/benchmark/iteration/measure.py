"""Runs rollout and training of both sides in turns, each in a process of its own, as a run has them."""

import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from megatron_tspin.benchmark.answers.settings import OURS
from megatron_tspin.benchmark.child import Child, threads_environment
from megatron_tspin.benchmark.iteration.results import IterationResult, StageMeasurement
from megatron_tspin.benchmark.iteration.settings import ROLLOUT, SIDES, STAGES, IterationSettings
from megatron_tspin.benchmark.machine import describe_machine
from megatron_tspin.log import get_logger

_LEARNING_RATE = 5e-7
_CLIP = 1.0

_log = get_logger(__name__)


def run_iteration_benchmark(settings: IterationSettings) -> IterationResult:
    """Measures everything.

    Raises:
        ChildError: A side failed.
    """
    result = IterationResult(settings, describe_machine())
    for _ in range(settings.rounds):
        for stage in STAGES:
            for side in SIDES:
                with Child(_serve, side, stage, settings, environment=threads_environment(settings.threads)) as child:
                    rate: float = child.receive()
                    found: StageMeasurement = child.ask("go")
                result.matmul_flops_per_second.append(rate)
                result.measurements[side, stage].append(found)
                _log.info("%s, %s: %.1f s", side, stage, found.seconds)
    return result


def _serve(connection: Connection, side: str, stage: str, settings: IterationSettings) -> None:
    """The life of a process: loads, works a little, then does its stage."""
    from megatron_tspin.benchmark.memory import PeakMemory
    from megatron_tspin.benchmark.rates import matmul_rate
    from megatron_tspin.benchmark.stopwatch import timed

    work = (_rollout if stage == ROLLOUT else _training)(side, settings)
    connection.send((True, matmul_rate(bf16=False)))
    connection.recv()
    memory, processor = PeakMemory(), time.process_time()
    tokens, seconds = timed(work)
    processor = time.process_time() - processor
    found = StageMeasurement(seconds, processor, memory.held_mib + memory.peak_mib(), tokens)
    connection.send((True, found))


def _rollout(side: str, settings: IterationSettings) -> Callable[[], int]:
    """Answers all prompts; returns the tokens of the answers."""
    from megatron_tspin.benchmark.answers.engines import make_engine
    from megatron_tspin.benchmark.answers.settings import Workload

    answers, workload = settings.rollout()
    engine = make_engine(side, answers)
    engine.answer(settings.prompts[:2], Workload(2, 2, ends=True), settings.seed)
    return lambda: sum(engine.answer(settings.prompts, workload, settings.seed))


def _training(side: str, settings: IterationSettings) -> Callable[[], int]:
    """One epoch over the triplets; returns their tokens."""
    work = _own_training(settings) if side == OURS else _transformers_training(settings)
    tokens = sum(len(each.prompt) + sum(map(len, each.responses)) for each in settings.triplets())

    def train() -> int:
        work()
        return tokens

    return train


def _own_training(settings: IterationSettings) -> Callable[[], None]:
    from megatron_tspin.benchmark.own_side import OwnSide, as_triplets
    from megatron_tspin.benchmark.settings import PACKED

    batches = settings.global_batches()
    side = OwnSide(PACKED, settings.step(), batches[0], num_steps=len(batches))
    side.forward_backward()  # a first pass, which takes the memory

    def train() -> None:
        for batch in batches:
            side.train_step(as_triplets(batch))

    return train


def _transformers_training(settings: IterationSettings) -> Callable[[], None]:
    """The padded concatenated forward, RMSProp as torch has it, and the gradient clipped to a norm of 1."""
    import torch

    from megatron_tspin.benchmark.transformers_side import TransformersSide, load_model

    step, batches = settings.step(), settings.global_batches()
    model = load_model(step)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=_LEARNING_RATE, alpha=0.99)
    sides = [TransformersSide(step, batch, settings.micro_batch_size, model=model) for batch in batches]
    sides[0].zero_gradients()
    sides[0].forward_backward()

    def train() -> None:
        for side in sides:
            side.zero_gradients()
            side.forward_backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            optimizer.step()

    return train
