"""Runs the reduced form of checks in one process, and looks at what they leave behind; started by a test.

python reduced_checks.py FOLDER CHECK...    # writes FOLDER/CHECK.json each, and FOLDER/facts.json
"""

import dataclasses
import gc
import json
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch

from megatron_tspin.benchmark.gpu_report import runner, step
from megatron_tspin.benchmark.gpu_report.check import Outcome
from megatron_tspin.benchmark.gpu_report.policies import topology
from megatron_tspin.benchmark.work import Work, predicted_flops
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.objective.packing import work_model


class Told:
    """The parent's end of the pipe, as far as the child sees it."""

    def __init__(self) -> None:
        self.messages: list[tuple[bool, Any]] = []

    def send(self, message: tuple[bool, Any]) -> None:
        self.messages.append(message)


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        told = Told()
        runner.serve_cases(cast(Connection, told), f"{runner.PACKAGE}.{name}", reduced=True)
        (_, (cases, _)), *rest = told.messages
        outcomes = [dataclasses.asdict(message) for _, message in rest if isinstance(message, Outcome)]
        (folder / f"{name}.json").write_text(json.dumps({"cases": cases, "outcomes": outcomes}))
    gc.collect()
    facts = {"policies_left": sum(isinstance(each, PolicyModel) for each in gc.get_objects())}
    (folder / "facts.json").write_text(json.dumps(facts | flops()))


def flops() -> dict[str, float]:
    """Products of one of our steps as torch counts them, and as they are predicted; without attention."""
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_tspin.benchmark.gpu_report.formats import FORMATS, LOCAL_BF16
    from megatron_tspin.benchmark.lengths import response_tokens
    from megatron_tspin.benchmark.own_side import as_triplets, make_config
    from megatron_tspin.benchmark.settings import PACKED

    task = step.Task(step.REDUCED, step.REDUCED.lengths[0])
    shape, batch = task.architecture, task.shapes
    trainer = _trainer(make_config(PACKED, task.settings), shape, FORMATS[LOCAL_BF16])
    triplets = as_triplets(task.tokens)
    places = sum(micro_batch.rows.places for micro_batch in trainer.planner.plan(triplets))
    addmm_in_place = {torch.ops.aten.addmm_: _products_of_addmm}
    with FlopCounterMode(display=False, custom_mapping=addmm_in_place) as counter:
        trainer.forward_backward(triplets)
    counted = counter.get_flop_counts()["Global"].items()
    work = work_model(shape)
    return {
        "counted": sum(count for name, count in counted if "attention" not in str(name)),
        "predicted": Work(places, 0, response_tokens(batch), head=4.0).flops(shape),
        "by_step": predicted_flops(PACKED, batch, shape, task.settings),
        "by_planner": sum(work.training(each, True) for each in batch),
    }


def _products_of_addmm(_: Any, left: Any, right: Any, **__: Any) -> int:
    """Of shapes."""
    return 2 * int(left[0]) * int(left[1]) * int(right[1])


def _trainer(config: Any, shape: Any, precision: Any) -> Any:
    from megatron_tspin.benchmark.gpu_report.policies import random_policy
    from megatron_tspin.training.loop import build_trainer

    return build_trainer(config, 1, topology(), random_policy(shape, precision, config.training), num_steps=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
