"""What an iteration trains on: triplets in their order, cut or refused where a packed row cannot hold them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import Config
from megatron_tspin.errors import InputError
from megatron_tspin.objective.roles import ROLES
from megatron_tspin.run_folder import RunFolder
from megatron_tspin.training.triplet_source import TripletSource
from tests.training.trajectory import make_config
from tests.training.triplet_files import LENGTHS, all_of, document, expected, write_triplets

ITERATION = 2

Build = Callable[..., Config]


@pytest.fixture
def build(tmp_path: Path, tiny_checkpoint: Any) -> Build:
    """Writes the data of an iteration; returns the config of its run, with the settings that are given."""
    folder = RunFolder(tmp_path / "run")
    write_triplets(folder, ITERATION)

    def config(**settings: Any) -> Config:
        small = {"run_dir": str(folder.root), "training.global_batch_size": 3, "training.row_capacity": None}
        return make_config(tiny_checkpoint("tied"), **{**small, **settings})

    return config


@pytest.mark.parametrize("roles", [ROLES, ROLES[:2], ROLES[:1]], ids=len)
def test_triplets_are_those_of_the_documents(roles: tuple[str, ...], build: Build) -> None:
    source = TripletSource(build(), ITERATION, roles)
    for index, triplet in enumerate(all_of(source)):
        assert triplet.id == f"ex-{index}" and triplet.reference is None
        assert triplet.prompt == document(index, 0, LENGTHS[index][0])
        assert triplet.responses == {role: expected(index, role) for role in roles}
    assert source.num_steps == 3
    ids = [triplet.id for step in range(3) for triplet in source.global_batch(step)]
    assert sorted(ids) == [f"ex-{i}" for i in range(8)]


def orders(config: Config) -> list[list[str]]:
    source = TripletSource(config, ITERATION, ROLES)
    return [[triplet.id for triplet in source.global_batch(step)] for step in range(6)]


def test_the_order_depends_on_the_data_alone(build: Build) -> None:
    """Not on the layout of ranks or rows, so that any layout trains the same policy."""
    found = orders(build())
    for layout in (
        {"parallel.data_parallel_size": 2},
        {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True},
        {"parallel.pipeline_model_parallel_size": 2},
        {"parallel.context_parallel_size": 2},
        {"training.layout": "padded", "training.micro_batch_size": 1},
        {"training.share_prompts": False},
    ):
        assert orders(build(**layout)) == found
    assert found[:3] != found[3:], "the second epoch"
    assert orders(build(seed=7)) != found


def test_balanced_batches_have_a_light_a_middling_and_a_heavy_triplet(build: Build) -> None:
    strata = [{"ex-2", "ex-5"}, {"ex-0", "ex-6", "ex-7"}, {"ex-1", "ex-3", "ex-4"}]  # the first has none for step 3

    def is_even(batch: list[str]) -> bool:
        return all(len(stratum & set(batch)) == 1 for stratum in strata)

    assert all(is_even(batch) for batch in orders(build()) if len(batch) == 3)
    shuffled = orders(build(**{"training.data_order": "shuffled"}))
    assert not all(is_even(batch) for batch in shuffled if len(batch) == 3)


def test_triplets_beyond_a_row_are_refused_by_name(build: Build) -> None:
    with pytest.raises(InputError) as caught:
        TripletSource(build(**{"training.row_capacity": 40}), ITERATION, ROLES)
    assert str(caught.value).splitlines() == [
        "training.row_capacity = 40 tokens is too small for 2 of 8 triplets; set --tspin-row-capacity to 72 or more, "
        "or --tspin-over-capacity truncate",
        "prompt ex-1: its triplet has 50 tokens",
        "prompt ex-4: its triplet has 70 tokens",
    ]
    TripletSource(build(**{"training.row_capacity": 72}), ITERATION, ROLES)


def test_only_the_roles_that_are_computed_need_room(build: Build) -> None:
    tight = {"training.row_capacity": 40, "objective.method": "sft"}
    assert TripletSource(build(**tight), ITERATION, ROLES[:1]).num_steps == 3


def test_unshared_prompts_need_room(build: Build) -> None:
    fits = {"training.row_capacity": 72}
    with pytest.raises(InputError, match="ex-4: its triplet has 80 tokens"):
        TripletSource(build(**fits, **{"training.share_prompts": False}), ITERATION, ROLES)


def test_padded_rows_have_no_capacity(build: Build) -> None:
    padded = {"training.layout": "padded", "training.row_capacity": 8, "training.micro_batch_size": 3}
    source = TripletSource(build(**padded), ITERATION, ROLES)
    assert [len(triplet.responses["synthetic"]) for triplet in all_of(source)] == [5, 9, 1, 8, 60, 2, 7, 5]


def test_long_triplets_are_cut_and_named(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    cut = build(**{"training.row_capacity": 40, "training.over_capacity": "truncate"})
    with caplog.at_level("WARNING", logger="megatron_tspin"):
        source = TripletSource(cut, ITERATION, ROLES)
    assert "responses of 2 of 8 triplets were cut to fit into rows of 40 tokens: prompts ex-1, ex-4" in caplog.text
    triplets = all_of(source)
    assert triplets[1].responses == {
        "annotated": expected(1, "annotated", 20), "synthetic": expected(1, "synthetic"), "proto": expected(1, "proto"),
    }  # fmt: skip
    assert triplets[4].responses["synthetic"] == expected(4, "synthetic", 30)
    for index in (0, 2, 3, 5, 6, 7):
        assert triplets[index].responses == {role: expected(index, role) for role in ROLES}
    assert max(triplet.shape().row_tokens(True) for triplet in triplets) == 40


def test_nothing_is_said_where_nothing_is_cut(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="megatron_tspin"):
        TripletSource(build(**{"training.over_capacity": "truncate"}), ITERATION, ROLES)
    assert caplog.text == ""


def test_references_go_with_their_triplets(build: Build) -> None:
    source = TripletSource(build(), ITERATION, ROLES)
    source.reference = [{role: -float(i) for role in ROLES} for i in range(8)]
    for step in range(3):
        for triplet in source.global_batch(step):
            assert triplet.reference == {role: -float(triplet.id.removeprefix("ex-")) for role in ROLES}
