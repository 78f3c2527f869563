"""Predicted operations against torch's own counter, and against each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.benchmark.lengths import draw_tokens
from megatron_tspin.benchmark.settings import OWN_SIDES, SIDES, StepSettings
from megatron_tspin.benchmark.work import predicted_flops, useful_flops
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.objective.packing import Shape, work_model

MICRO_BATCH = 2
SHAPES = [Shape(5, (10, 20, 7)), Shape(9, (3, 30, 12)), Shape(2, (9, 9, 40))]
PADDED = [25] * 3 + [39] * 3 + [42] * 3  # each triplet's rows, padded to their longest


def settings_of(folder: Path) -> StepSettings:
    return StepSettings(
        model=str(folder),
        sides=tuple(SIDES),
        lengths="ultrachat",
        max_length=64,
        triplets=5,
        micro_batch_size=MICRO_BATCH,
        row_capacity=256,
        rounds=1,
        threads=1,
    )


@pytest.fixture
def architecture(tiny_checkpoint: Callable[[str], Path]) -> Architecture:
    return read_architecture(tiny_checkpoint("untied"))


def work_of(architecture: Architecture, shapes: list[Shape]) -> dict[str, float]:
    settings = settings_of(architecture.folder)
    return {side: predicted_flops(side, shapes, architecture, settings) for side in (*SIDES, "trl")}


@pytest.mark.parametrize(("side", "padded_rows"), [("transformers", [39] * 6 + [42] * 3), ("transformers_mb1", PADDED)])
def test_transformers_multiplies_as_often_as_predicted(
    architecture: Architecture, side: str, padded_rows: list[int]
) -> None:
    """torch counts every matrix product; it has no count of the CPU's fused attention.

    Rotary angles are left out: older releases of transformers compute them as a matrix product.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_tspin.benchmark.transformers_side import TransformersSide

    settings = settings_of(architecture.folder)
    batch = draw_tokens(SHAPES, architecture.vocab_size, seed=0)
    run: Any = TransformersSide(settings, batch, settings.micro_batch_of(side))
    with FlopCounterMode(display=False) as counter:
        run.forward_backward()
    counts = counter.get_flop_counts()
    products = sum(count for name, count in counts["Global"].items() if "attention" not in str(name))
    products -= sum(sum(count.values()) for module, count in counts.items() if module.endswith("rotary_emb"))
    attention = 3.5 * work_model(architecture).per_pair * sum(length**2 for length in padded_rows)
    assert products + attention == predicted_flops(side, SHAPES, architecture, settings)


def test_sharing_and_packing_save_work_and_useful_work_is_least(architecture: Architecture) -> None:
    work = work_of(architecture, SHAPES)
    assert work["packed"] < work["unshared"] < work["padded"]
    assert work["packed"] < work["transformers_mb1"] < work["transformers"] == work["trl"]
    assert useful_flops(SHAPES, architecture) < work["packed"]


def test_packed_work_is_the_planners(architecture: Architecture) -> None:
    work, model = work_of(architecture, SHAPES), work_model(architecture)
    for side, share in (("packed", True), ("unshared", False)):
        assert work[side] == pytest.approx(sum(model.training(shape, share) for shape in SHAPES), rel=1e-12)


def test_equal_lengths_leave_little_to_gain(architecture: Architecture) -> None:
    own = [work_of(architecture, [Shape(1, (64, 64, 64))] * 4)[side] for side in OWN_SIDES]
    assert max(own) / min(own) < 1.02


def test_an_incomplete_micro_batch_is_padded_with_empty_rows(architecture: Architecture) -> None:
    shape = Shape(8, (9, 9, 9))
    assert work_of(architecture, [shape] * 3)["padded"] > 1.25 * work_of(architecture, [shape] * 2)["padded"]
