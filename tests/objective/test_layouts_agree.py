"""Packed rows, shared prompts or not, give the loss and the gradients of padded rows, whatever the triplets."""

from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import ObjectiveSection, ParallelSection, TrainingSection
from megatron_tspin.config_precision import PrecisionSection
from tests.objective.packed_rows import triplet_lists
from tests.rank_pool import in_layout
from tests.rounding import all_within, same_gradients

pytestmark = pytest.mark.exact

OBJECTIVE = ObjectiveSection(alpha=0.1, nll_weight=1.0)
"""The likelihood of y keeps gradients from vanishing where y = y' = y0, so that they can be compared."""
EXAMPLES = 40


def loss_and_gradients(planner: Any, triplets: list[Any], model: Any) -> tuple[float, dict[str, Any]]:
    from megatron_tspin.objective.forward import make_forward_step

    step = make_forward_step(OBJECTIVE, beta=0.3)
    model.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    for batch in planner.plan(triplets):
        output, loss_func = step(iter([batch]), model)
        loss, triplets_in_row, _ = loss_func(output)
        loss.backward()
        total, count = total + loss.item(), count + int(triplets_in_row)
    assert count == len(triplets)
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def compare_layouts(folder: Path) -> int:
    """Returns the number of examples that packed more than one triplet into a row."""
    from dataclasses import replace

    from hypothesis import Phase, given, settings
    from hypothesis import strategies as st

    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.models.hf_config import read_architecture
    from megatron_tspin.models.provider import make_model_provider
    from megatron_tspin.objective.batches import BatchPlanner
    from megatron_tspin.objective.packing import Packing, work_model
    from megatron_tspin.objective.roles import ROLES

    architecture, together = read_architecture(folder), 0
    with in_layout(ParallelSection()) as topology:
        model = make_model_provider(architecture, ParallelSection(), TrainingSection(), PrecisionSection())()
        load_hf(model, topology)
        work = work_model(architecture)

        # Always the same: gradients that cancel leave rounding alone. Shrinking would take longer than a rank may.
        @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
        @given(triplets=triplet_lists(), share_prompts=st.booleans(), spare=st.integers(0, 400), uniform=st.booleans())
        def check(triplets: list[Any], share_prompts: bool, spare: int, uniform: bool) -> None:
            nonlocal together
            triplets = [replace(each, reference=None) for each in triplets]
            largest = max(each.shape().row_tokens(share_prompts) for each in triplets)
            packing = Packing(-(-(largest + spare) // 8) * 8, 8, share_prompts, uniform)
            packed = BatchPlanner(packing, work, ROLES, 1)
            together += any(batch.num_triplets > 1 for batch in packed.plan(triplets))
            loss, found = loss_and_gradients(packed, triplets, model)
            expected_loss, expected = loss_and_gradients(BatchPlanner(None, work, ROLES, 2), triplets, model)
            all_within("loss", [loss], [expected_loss])
            same_gradients(found, expected)

        check()
    return together


@pytest.mark.parametrize("kind", ["tied", "mistral_window"])
def test_packed_rows_train_as_padded_ones_do(kind: str, ranks: Any, tiny_checkpoint: Any) -> None:
    [together] = ranks(1).run(compare_layouts, tiny_checkpoint(kind))
    assert together > EXAMPLES // 8, "hardly any row held several triplets"
