"""Plans of packed rows: nothing is lost, nothing is too long, and rows and replicas have about the same work."""

import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_tspin.config_source import load_config
from megatron_tspin.errors import InputError
from megatron_tspin.models.architecture import Architecture, LayerFacts, Norm
from megatron_tspin.models.packed_attention import visible
from megatron_tspin.models.row_layout import Bundle, RowLayout
from megatron_tspin.objective.packing import (
    Packing,
    PlannedRow,
    Shape,
    WorkModel,
    check_capacity,
    plan_rows,
    row_packing,
    truncated,
    work_model,
)

WORK = WorkModel(per_token=100.0, per_pair=3.0, per_target=40.0)
TOKENS_ALONE = WorkModel(per_token=1.0, per_pair=0.0, per_target=0.0)

prompts, responses = st.integers(1, 40), st.integers(1, 60)
shapes = st.builds(Shape, prompts, st.lists(responses, min_size=1, max_size=3).map(tuple))
shape_lists = st.integers(1, 3).flatmap(
    lambda roles: st.lists(st.builds(Shape, prompts, st.tuples(*[responses] * roles)), min_size=1, max_size=25)
)


@st.composite
def packings(draw: Any, needed: int) -> Packing:
    multiple = draw(st.sampled_from([1, 8, 24]))
    capacity = -(-(needed + draw(st.integers(0, 300))) // multiple) * multiple
    return Packing(capacity, multiple, draw(st.booleans()), draw(st.booleans()), draw(st.integers(1, 3)))


@st.composite
def problems(draw: Any) -> tuple[list[Shape], Packing, int]:
    """Triplets that all fit, a way to pack them, and a number of replicas."""
    found = draw(shape_lists)
    packing = draw(packings(max(shape.row_tokens(False) for shape in found)))
    return found, packing, draw(st.integers(1, 4))


def tokens(row: PlannedRow, of: list[Shape], packing: Packing) -> int:
    return sum(of[i].row_tokens(packing.share_prompts) for i in row.members)


def load(row: PlannedRow, of: list[Shape], packing: Packing) -> float:
    return sum(WORK.training(of[i], packing.share_prompts) for i in row.members)


@given(problem=problems())
def test_every_triplet_is_in_one_row(problem: Any) -> None:
    found, packing, replicas = problem
    shares = plan_rows(found, packing, WORK, replicas)
    members = [member for rows in shares for row in rows for member in row.members]
    assert sorted(members) == list(range(len(found)))
    assert len(shares) == replicas and len({len(rows) for rows in shares}) == 1
    assert len(shares[0]) > 0 and len(shares[0]) % packing.row_count_multiple == 0
    assert all(list(row.members) == sorted(row.members) for rows in shares for row in rows)
    assert plan_rows(found, packing, WORK, replicas) == shares


@given(problem=problems())
def test_rows_are_as_long_as_they_have_to_be(problem: Any) -> None:
    found, packing, replicas = problem
    rows = [row for share in plan_rows(found, packing, WORK, replicas) for row in share]
    needed = [max(-(-tokens(row, found, packing) // packing.multiple), 1) * packing.multiple for row in rows]
    assert [row.length for row in rows] == ([max(needed)] * len(rows) if packing.uniform else needed)
    assert max(row.length for row in rows) <= packing.capacity


@given(problem=problems())
def test_rows_are_few(problem: Any) -> None:
    """Placing fails only where every row is more than half full, if no triplet takes more than half a row."""
    found, packing, replicas = problem
    sizes = [shape.row_tokens(packing.share_prompts) for shape in found]
    assume(2 * max(sizes) <= packing.capacity)
    count = sum(len(rows) for rows in plan_rows(found, packing, WORK, replicas))
    least, at_once = -(-sum(sizes) // packing.capacity), replicas * packing.row_count_multiple
    assert least <= count <= max(-(-least // at_once) * at_once, 2 * sum(sizes) / packing.capacity + at_once)


@given(of=shape_lists, replicas=st.integers(1, 6), share_prompts=st.booleans())
def test_work_is_shared_evenly_where_there_is_room(of: list[Shape], replicas: int, share_prompts: bool) -> None:
    packing = Packing(10**6, 8, share_prompts)
    loads = [load(row, of, packing) for rows in plan_rows(of, packing, WORK, replicas) for row in rows]
    assert len(loads) == replicas
    assert max(loads) <= min(loads) + max(WORK.training(shape, share_prompts) for shape in of) + 1e-6


@given(problem=problems())
def test_replicas_differ_by_no_more_than_rows_do(problem: Any) -> None:
    found, packing, replicas = problem
    shares = plan_rows(found, packing, WORK, replicas)
    loads = [[load(row, found, packing) for row in rows] for rows in shares]
    every = [each for of_replica in loads for each in of_replica]
    sums = [sum(of_replica) for of_replica in loads]
    assert max(sums) - min(sums) <= max(every) - min(every) + 1e-6


def test_replicas_take_turns_at_the_heavier_row() -> None:
    of = [Shape(size, (1,)) for size in (10, 40, 20, 30)]
    shares = plan_rows(of, Packing(40, 10), TOKENS_ALONE, replicas=2)
    assert shares == [[PlannedRow((1,), 40), PlannedRow((0,), 10)], [PlannedRow((3,), 30), PlannedRow((2,), 20)]]


def test_work_decides_and_not_tokens() -> None:
    """Eight short triplets have the tokens of one long one, but not its attention."""
    of = [*[Shape(10, (1,))] * 8, Shape(80, (1,))]
    attention = WorkModel(per_token=0.0, per_pair=1.0, per_target=0.0)
    [first, second] = (rows[0].members for rows in plan_rows(of, Packing(1000, 8), attention, replicas=2))
    assert (first, second) == ((8,), tuple(range(8))), "the heavy one comes last and has its row all the same"
    by_tokens = plan_rows(of[4:], Packing(1000, 8), TOKENS_ALONE, replicas=2)
    assert [rows[0].members for rows in by_tokens] == [(4,), (0, 1, 2, 3)]


@pytest.mark.parametrize(
    ("replicas", "row_count_multiple", "each"), [(1, 1, 6), (2, 1, 3), (4, 1, 2), (1, 4, 8), (2, 2, 4)]
)
def test_rows_are_added_one_at_a_time(replicas: int, row_count_multiple: int, each: int) -> None:
    """Six triplets that need a row each, though four rows have the tokens."""
    packing = Packing(64, 8, row_count_multiple=row_count_multiple)
    shares = plan_rows([Shape(33, (1,))] * 6, packing, WORK, replicas)
    assert [len(rows) for rows in shares] == [each] * replicas


def test_fewer_triplets_than_replicas() -> None:
    shares = plan_rows([Shape(3, (2, 2))], Packing(16, 8), WORK, replicas=3)
    assert sorted(rows[0].members for rows in shares) == [(), (), (0,)]
    assert {rows[0].length for rows in shares} == {8}


def test_a_triplet_beyond_capacity_is_no_endless_search() -> None:
    with pytest.raises(InputError, match="a triplet of 17 tokens does not fit into rows of 16"):
        plan_rows([Shape(16, (2,))], Packing(16, 8), WORK)


@given(shape=shapes, share_prompts=st.booleans())
def test_shapes_count_what_a_row_has(shape: Shape, share_prompts: bool) -> None:
    """Against the layout of the row itself, pair by pair."""
    kept = [tuple(response - 1 for response in bundle.responses) for bundle in shape.bundles(share_prompts)]
    layout = RowLayout(bundles=tuple(Bundle(shape.prompt, each) for each in kept), length=300)
    in_bundles = layout.token_facts(torch.device("cpu"))[0] >= 0
    assert int(in_bundles.sum()) == shape.row_tokens(share_prompts)
    assert int(visible(layout, None, torch.device("cpu"))[in_bundles].sum()) == shape.attention_pairs(share_prompts)


def test_work_of_a_tiny_architecture() -> None:
    tiny = Architecture(
        "llama", 50, 6, 10, 2, 1, 4, 128, (LayerFacts(),) * 2, Norm("rms", 1e-5), (), 0.5, tied_embeddings=True
    )
    work = work_model(tiny)
    q, k, v, o, mlp = 6 * 8, 6 * 4, 6 * 4, 8 * 6, 3 * 6 * 10
    assert work.per_token == 2 * 2 * (q + k + v + o + mlp)
    assert work.per_pair == 2 * (2 * 8 + 2 * 8)  # scores and their use, in two layers of two heads of 4
    assert work.per_target == 2 * 6 * 50
    # 3 + 1 + 2 places; 6 pairs in the prompt, 4 and 4 + 5 of the responses; 2 + 3 tokens to predict.
    shape = Shape(3, (2, 3))
    assert work.training(shape, True) == 3 * work.per_token * 6 + 3.5 * work.per_pair * 19 + 4 * work.per_target * 5
    assert work.training(shape, False) == 3 * work.per_token * 9 + 3.5 * work.per_pair * 25 + 4 * work.per_target * 5


def test_what_does_not_fit_is_named() -> None:
    of, ids = [Shape(9, (8, 8)), Shape(3, (2,)), Shape(20, (9, 9))], ["first", "second", "third"]
    check_capacity(of[1:2], ids[1:2], Packing(16, 8))
    with pytest.raises(InputError) as caught:
        check_capacity(of, ids, Packing(16, 8))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("training.row_capacity = 16 tokens is too small for 2 of 3 triplets;")
    assert lines[1:] == ["prompt first: its triplet has 23 tokens", "prompt third: its triplet has 36 tokens"]


def test_many_that_do_not_fit_are_counted() -> None:
    with pytest.raises(InputError) as caught:
        check_capacity([Shape(9, (9,))] * 25, [str(i) for i in range(25)], Packing(16, 8))
    lines = str(caught.value).splitlines()
    assert len(lines) == 22 and lines[-2:] == ["prompt 19: its triplet has 17 tokens", "and 5 more"]


@given(of=shape_lists, tensor=st.sampled_from([1, 24]), share_prompts=st.booleans())
def test_doing_what_the_message_says_helps(of: list[Shape], tensor: int, share_prompts: bool) -> None:
    """Rows are cut down to a multiple, so the advice is one."""
    settings = {
        "training.share_prompts": share_prompts,
        "parallel.tensor_model_parallel_size": tensor,
        "parallel.sequence_parallel": tensor > 1,
    }
    tight, ids = row_packing(config(**settings, **{"training.row_capacity": 8})), [str(i) for i in range(len(of) + 1)]
    of = [*of, Shape(100, (2,))]
    assert tight is not None
    with pytest.raises(InputError) as caught:
        check_capacity(of, ids, tight)
    [advised] = re.findall(r"--tspin-row-capacity to (\d+) or more", str(caught.value))
    enough = row_packing(config(**settings, **{"training.row_capacity": int(advised)}))
    assert enough is not None
    check_capacity(of, ids, enough)


def config(**settings: Any) -> Any:
    needed = {"run_dir": "r", "model.hf_checkpoint": "h", "data.annotated": "a"}
    return load_config(None, {**needed, **settings})


def test_the_config_says_how_to_pack() -> None:
    assert row_packing(config(**{"training.layout": "padded"})) is None
    assert row_packing(config()) == Packing(4 * 2048, 8, share_prompts=True, uniform=False)
    tight = {"training.row_capacity": 100, "training.share_prompts": False, "parallel.pipeline_model_parallel_size": 2}
    assert row_packing(config(**tight)) == Packing(96, 8, share_prompts=False, uniform=True)
    virtual = {**tight, "parallel.virtual_pipeline_model_parallel_size": 3}
    by_twos = Packing(96, 8, share_prompts=False, uniform=True, row_count_multiple=2)
    assert row_packing(config(**virtual)) == by_twos
    split = {"parallel.context_parallel_size": 3, "training.row_capacity": 100}
    assert row_packing(config(**split)) == Packing(96, 24, share_prompts=True, uniform=False)
    assert row_packing(config(**{**split, "training.row_capacity": 8})) == Packing(24, 24)


@given(shape=shapes, capacity=st.integers(1, 260), share_prompts=st.booleans())
def test_truncating(shape: Shape, capacity: int, share_prompts: bool) -> None:
    packing, count = Packing(capacity, 1, share_prompts), len(shape.responses)
    if shape.prompt * (1 if share_prompts else count) > capacity:
        with pytest.raises(InputError, match=f"does not hold prompt q7 of {shape.prompt} tokens"):
            truncated(shape, packing, "q7")
        return
    found = truncated(shape, packing, "q7")
    if shape.row_tokens(share_prompts) <= capacity:
        assert found == shape
        return
    assert found.prompt == shape.prompt and len(found.responses) == count
    assert found.row_tokens(share_prompts) == capacity, "room was left unused"
    longest = max(found.responses)
    for before, after in zip(shape.responses, found.responses, strict=True):
        assert 1 <= after <= before
        assert after == before or after >= longest - 1, "a response was cut more than another one"


def test_short_responses_stay_whole() -> None:
    assert truncated(Shape(10, (50, 4, 31)), Packing(64, 8), "q7") == Shape(10, (27, 4, 26))
    assert truncated(Shape(10, (7, 7)), Packing(24, 8), "q7") == Shape(10, (7, 7))
