"""Layouts: every response token is predicted by exactly the position before it, whatever the lengths."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tspin.models.row_layout import ContextShare
from megatron_tspin.objective.batches import BatchPlanner, MicroBatch, Triplet
from megatron_tspin.objective.packing import Packing, WorkModel, plan_rows
from megatron_tspin.objective.roles import ROLES
from megatron_tspin.objective.rows import Rows, pack_row, pad_rows, row_length
from tests.objective.packed_rows import ids, pair, responses_in, triplet_lists, whole_row
from tests.row_bundles import context_shares, covering

WORK = WorkModel(per_token=100.0, per_pair=3.0, per_target=40.0)
bundles_of_ids = st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=4)), min_size=0, max_size=4)


def read_back(rows: Rows) -> list[list[int]]:
    """The responses that the targets of padded rows spell, checking that each token comes from the position before."""
    batch, length = rows.tokens.shape
    spelled: list[list[int]] = [[] for _ in range(rows.targets.num_responses)]
    last: dict[int, int] = {}
    for flat, wanted, owner in zip(
        rows.targets.positions.tolist(),
        rows.targets.token_ids.tolist(),
        rows.targets.response_index.tolist(),
        strict=True,
    ):
        position, row = divmod(flat, batch)  # hidden states are [s, b, h]
        assert row == owner and position < length
        assert position == last.get(row, position - 1) + 1, "a token was skipped or predicted twice"
        if row in last:  # the token fed at this position is the one predicted before
            assert rows.tokens[row, position].item() == spelled[row][-1]
        last[row] = position
        spelled[row].append(wanted)
    return spelled


@given(pairs=st.lists(pair, min_size=1, max_size=6), spare=st.integers(0, 3), multiple=st.integers(1, 12))
def test_padded_rows(pairs: Any, spare: int, multiple: int) -> None:
    length = row_length(pairs, multiple)
    rows = pad_rows(pairs, len(pairs) + spare, length)
    assert length % multiple == 0 and length % 8 == 0
    assert rows.tokens.shape == rows.position_ids.shape == (len(pairs) + spare, length)
    assert read_back(rows) == [response for _, response in pairs]
    for row, (prompt, response) in enumerate(pairs):
        fed = [*prompt, *response][:-1]
        assert rows.tokens[row].tolist() == fed + [0] * (length - len(fed))
    first = {}
    for flat, owner in zip(rows.targets.positions.tolist(), rows.targets.response_index.tolist(), strict=True):
        first.setdefault(owner, flat // rows.tokens.shape[0])
    assert first == {row: len(prompt) - 1 for row, (prompt, _) in enumerate(pairs)}
    assert (rows.position_ids == torch.arange(length)).all()
    assert rows.num_tokens == sum(len(prompt) + len(response) for prompt, response in pairs)
    assert rows.used == sum(len(prompt) + len(response) - 1 for prompt, response in pairs)
    assert rows.places == (len(pairs) + spare) * length and rows.row_length == length and rows.layout is None
    assert rows.prompt_tokens == rows.prompt_places == sum(len(prompt) for prompt, _ in pairs)


def test_the_shortest_pair_still_has_a_row() -> None:
    assert row_length([([5], [6])]) == 8
    assert row_length([([5], [])]) == 8
    assert row_length([([1] * 8, [2])]) == 8
    assert row_length([([1] * 8, [2, 3])]) == 16


@pytest.mark.parametrize(("multiple", "expected"), [(1, 8), (2, 8), (3, 24), (6, 24), (16, 16)])
def test_lengths_suit_sequence_parallelism_of_any_size(multiple: int, expected: int) -> None:
    assert row_length([([1, 2], [3])], multiple) == expected


@given(bundles=bundles_of_ids, spare=st.integers(0, 2), size=st.sampled_from([1, 2, 4]))
def test_packed_rows(bundles: Any, spare: int, size: int) -> None:
    """Whatever ranks share the row: each response token is predicted once, from its prompt and what precedes it."""
    used = sum(len(prompt) + sum(len(response) - 1 for response in responses) for prompt, responses in bundles)
    length = covering(used, ContextShare(0, size), spare)
    parts = [pack_row(bundles, length, ContextShare(rank, size)) for rank in range(size)]
    assert responses_in(parts) == [(prompt, response) for prompt, responses in bundles for response in responses]
    _, tokens, positions = whole_row(parts)
    flat: list[tuple[int, int]] = []
    for prompt, responses in bundles:
        flat += list(zip(prompt, range(len(prompt)), strict=True))
        for response in responses:
            flat += [(each, len(prompt) + place) for place, each in enumerate(response[:-1])]
    assert list(zip(tokens, positions, strict=True)) == flat + [(0, 0)] * (length - used)
    for part in parts:
        assert (part.places, part.used, part.row_length) == (length, used, length)
        assert part.num_tokens == sum(len(prompt) + len(each) for prompt, responses in bundles for each in responses)
        assert part.prompt_tokens == sum(len(prompt) * len(responses) for prompt, responses in bundles)
        assert part.prompt_places == sum(len(prompt) for prompt, _ in bundles)


def test_a_packed_row_by_hand() -> None:
    rows = pack_row([([5, 6], [[7, 8, 9], [4], [3, 2]]), ([1], [[2]])], 8)
    assert rows.tokens.tolist() == [[5, 6, 7, 8, 3, 1, 0, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 0, 0]]
    assert rows.targets.positions.tolist() == [1, 2, 3, 1, 1, 4, 5]
    assert rows.targets.token_ids.tolist() == [7, 8, 9, 4, 3, 2, 2]
    assert rows.targets.response_index.tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert rows.targets.num_responses == 4 and rows.targets.diagnostics is False


def test_diagnostics_are_asked_for() -> None:
    assert pack_row([([5], [[7]])], 8, diagnostics=True).targets.diagnostics
    assert pad_rows([([5], [7])], 1, 8, diagnostics=True).targets.diagnostics
    for packing in (None, Packing(48, 8)):
        [batch] = BatchPlanner(packing, WORK, ROLES[:1], 1, diagnostics=True).plan(
            [Triplet("a", [1], {"annotated": [2]})]
        )
        assert batch.rows.targets.diagnostics


@given(
    triplets=triplet_lists(), size=st.integers(1, 4), replicas=st.integers(1, 4), multiple=st.sampled_from([1, 2, 3, 4])
)
def test_replicas_share_a_padded_batch(triplets: list[Triplet], size: int, replicas: int, multiple: int) -> None:
    plans = [
        BatchPlanner(None, WORK, ROLES, size, multiple, replica, replicas).plan(triplets) for replica in range(replicas)
    ]
    assert len({len(batches) for batches in plans}) == 1 and len(plans[0]) >= 1
    lengths = {batch.rows.row_length for batches in plans for batch in batches}
    assert len(lengths) == 1 and min(lengths) % multiple == 0
    shapes = {tuple(batch.rows.tokens.shape) for batches in plans for batch in batches}
    assert shapes == {(size * len(ROLES), *lengths)}
    rounds = zip(*plans, strict=True)
    in_order = [batch for one_each in rounds for batch in one_each]
    spelled = [response for batch in in_order for response in read_back(batch.rows)]
    assert spelled == [list(triplet.responses[role]) for triplet in triplets for role in ROLES]
    check_facts(in_order, triplets)


@st.composite
def packed_batches(draw: Any) -> tuple[list[Triplet], Packing, int, int]:
    triplets = draw(triplet_lists())
    share_prompts, size = draw(st.booleans()), draw(st.sampled_from([1, 2, 4]))
    largest = max(triplet.shape().row_tokens(share_prompts) for triplet in triplets)
    capacity = -(-(largest + draw(st.integers(0, 150))) // 8) * 8
    return triplets, Packing(capacity, 8, share_prompts, draw(st.booleans())), draw(st.integers(1, 3)), size


@given(problem=packed_batches())
def test_replicas_share_a_packed_batch(problem: Any) -> None:
    """Every triplet is in one micro-batch of one replica, and all ranks of a replica agree on it."""
    triplets, packing, replicas, size = problem
    shapes = [triplet.shape() for triplet in triplets]
    batches, members = [], []
    for replica, planned in enumerate(plan_rows(shapes, packing, WORK, replicas)):
        plans = [
            BatchPlanner(packing, WORK, ROLES, 1, 8, replica, replicas, ContextShare(rank, size)).plan(triplets)
            for rank in range(size)
        ]
        for row, parts in zip(planned, zip(*plans, strict=True), strict=True):
            mine = [triplets[i] for i in row.members]
            assert responses_in([part.rows for part in parts]) == [pair for each in mine for pair in each.pairs()]
            assert parts[0].rows.row_length == row.length
            assert parts[0].rows.used == sum(shapes[i].row_tokens(packing.share_prompts) for i in row.members)
            for part in parts:
                check_facts([part], mine)
            batches.append(parts[0])
            members += row.members
    assert sorted(members) == list(range(len(triplets)))
    check_facts(batches, [triplets[i] for i in members])
    saved = sum(batch.rows.prompt_tokens - batch.rows.prompt_places for batch in batches)
    assert saved == sum(2 * len(triplet.prompt) for triplet in triplets) * packing.share_prompts


def check_facts(batches: list[MicroBatch], triplets: list[Triplet]) -> None:
    y, y1, y0 = ([list(triplet.responses[role]) for triplet in triplets] for role in ROLES)
    assert sum(batch.num_triplets for batch in batches) == len(triplets)
    assert torch.cat([batch.identical for batch in batches]).tolist() == [a == b for a, b in zip(y, y1, strict=True)]
    assert torch.cat([batch.stalled for batch in batches]).tolist() == [a == b for a, b in zip(y1, y0, strict=True)]
    lengths = torch.cat([batch.lengths for batch in batches]).tolist()
    assert lengths == [[len(triplet.responses[role]) for role in ROLES] for triplet in triplets]
    references = [batch.reference for batch in batches if batch.num_triplets]
    assert all(batch.reference is None for batch in batches if not batch.num_triplets)
    found = torch.cat([value for value in references if value is not None]).tolist() if references else []
    assert found == [[(triplet.reference or {})[role] for role in ROLES] for triplet in triplets]


@pytest.mark.parametrize("packing", [None, Packing(48, 8)], ids=["padded", "packed"])
def test_an_empty_micro_batch_has_rows_but_no_targets(packing: Packing | None) -> None:
    triplet = Triplet("a", [1, 2], {"annotated": [3], "synthetic": [4, 5]})
    plans = [BatchPlanner(packing, WORK, ROLES[:2], 2, replica=r, replicas=2).plan([triplet]) for r in range(2)]
    [batch] = next(plan for plan in plans if not plan[0].num_triplets)
    assert batch.num_triplets == 0 and batch.rows.tokens.shape == ((4, 8) if packing is None else (1, 8))
    assert batch.rows.targets.num_responses == 0 and batch.rows.targets.positions.shape == (0,)
    assert batch.lengths.shape == (0, 2) and batch.reference is None and batch.identical.shape == (0,)
    assert not batch.rows.tokens.any() and batch.rows.used == batch.rows.num_tokens == 0


def test_rows_are_only_as_long_as_the_computed_roles() -> None:
    long = Triplet("a", [1], {"annotated": [3], "synthetic": [4]})
    [batch] = BatchPlanner(None, WORK, ROLES[:2], 1).plan([long])
    assert batch.rows.row_length == 8


@pytest.mark.parametrize("share", context_shares(), ids=str)
def test_a_row_of_padding_alone(share: ContextShare) -> None:
    rows = pack_row([], 8, share)
    assert rows.tokens.shape == (1, 8 // share.size) and rows.targets.positions.shape == (0,)
    assert rows.layout is not None and rows.layout.blocks == [] and rows.targets.num_responses == 0
