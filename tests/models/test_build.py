"""Policies that are built without room for their weights."""

from pathlib import Path
from typing import Any

from megatron_tspin.config import ParallelSection, TrainingSection
from megatron_tspin.config_precision import PrecisionSection
from tests.rank_pool import in_layout


def bytes_held(hf: Path) -> tuple[list[int], list[int]]:
    """Storage of each parameter that is no matrix of the vocabulary: built as always, and without storage."""
    from megatron_tspin.models.build import build_policy, without_storage
    from megatron_tspin.models.hf_config import read_architecture

    architecture = read_architecture(hf)
    rows = architecture.padded_vocab_size(1)

    def held(policy: Any) -> list[int]:
        return [p.untyped_storage().nbytes() for p in policy.parameters() if p.shape[0] != rows]

    with in_layout(ParallelSection()) as topology:

        def build() -> Any:
            return build_policy(architecture, ParallelSection(), TrainingSection(), PrecisionSection(), topology)

        with without_storage(rows):
            empty = build()
        return held(build()), held(empty)


def test_parameters_without_storage_take_one_element_each(ranks: Any, tiny_checkpoint: Any) -> None:
    whole, empty = ranks(1).run(bytes_held, tiny_checkpoint("untied"))[0]
    assert len(empty) == len(whole) > 20
    assert set(empty) == {4} and min(whole) > 4
