"""Layouts: every response token is predicted by exactly the position before it, whatever the lengths."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tspin.objective.batches import MicroBatch, Triplet, plan_micro_batches
from megatron_tspin.objective.roles import ROLES
from megatron_tspin.objective.rows import Rows, pad_rows, row_length

token = st.integers(1, 90)
pair = st.tuples(st.lists(token, min_size=1, max_size=12), st.lists(token, min_size=1, max_size=12))


def read_back(rows: Rows) -> list[list[int]]:
    """The responses that the targets spell, checking that each token comes from the position before it."""
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
def test_rows(pairs: Any, spare: int, multiple: int) -> None:
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


def test_the_shortest_pair_still_has_a_row() -> None:
    assert row_length([([5], [6])]) == 8
    assert row_length([([5], [])]) == 8
    assert row_length([([1] * 8, [2])]) == 8
    assert row_length([([1] * 8, [2, 3])]) == 16


@pytest.mark.parametrize(("multiple", "expected"), [(1, 8), (2, 8), (3, 24), (6, 24), (16, 16)])
def test_lengths_suit_sequence_parallelism_of_any_size(multiple: int, expected: int) -> None:
    assert row_length([([1, 2], [3])], multiple) == expected


@st.composite
def triplet_lists(draw: Any) -> list[Triplet]:
    made = []
    for index in range(draw(st.integers(1, 9))):
        prompt, annotated = draw(pair)
        synthetic = annotated if draw(st.booleans()) else draw(pair)[1]
        proto = synthetic if draw(st.booleans()) else draw(pair)[1]
        responses = dict(zip(ROLES, (annotated, synthetic, proto), strict=True))
        reference = {role: -float(index) - i for i, role in enumerate(ROLES)}
        made.append(Triplet(str(index), prompt, responses, reference))
    return made


@given(
    triplets=triplet_lists(), size=st.integers(1, 4), replicas=st.integers(1, 4), multiple=st.sampled_from([1, 2, 3, 4])
)
def test_replicas_share_a_global_batch(triplets: list[Triplet], size: int, replicas: int, multiple: int) -> None:
    plans = [plan_micro_batches(triplets, ROLES, size, replica, replicas, multiple) for replica in range(replicas)]
    assert len({len(batches) for batches, _ in plans}) == 1 and len(plans[0][0]) >= 1
    assert len({length for _, length in plans}) == 1 and plans[0][1] % multiple == 0
    shapes = {tuple(batch.rows.tokens.shape) for batches, _ in plans for batch in batches}
    assert shapes == {(size * len(ROLES), plans[0][1])}
    rounds = zip(*(batches for batches, _ in plans), strict=True)
    in_order = [batch for one_each in rounds for batch in one_each]
    spelled = [response for batch in in_order for response in read_back(batch.rows)]
    assert spelled == [list(triplet.responses[role]) for triplet in triplets for role in ROLES]
    assert sum(batch.num_triplets for batch in in_order) == len(triplets)
    check_facts(in_order, triplets)


def check_facts(batches: list[MicroBatch], triplets: list[Triplet]) -> None:
    y, y1, y0 = ([list(triplet.responses[role]) for triplet in triplets] for role in ROLES)
    assert torch.cat([batch.identical for batch in batches]).tolist() == [a == b for a, b in zip(y, y1, strict=True)]
    assert torch.cat([batch.stalled for batch in batches]).tolist() == [a == b for a, b in zip(y1, y0, strict=True)]
    lengths = torch.cat([batch.lengths for batch in batches]).tolist()
    assert lengths == [[len(triplet.responses[role]) for role in ROLES] for triplet in triplets]
    references = [batch.reference for batch in batches if batch.num_triplets]
    assert all(batch.reference is None for batch in batches if not batch.num_triplets)
    assert torch.cat([value for value in references if value is not None]).tolist() == [
        [(triplet.reference or {})[role] for role in ROLES] for triplet in triplets
    ]


def test_an_empty_micro_batch_has_rows_but_no_targets() -> None:
    triplet = Triplet("a", [1, 2], {"annotated": [3], "synthetic": [4, 5]})
    (batch,), length = plan_micro_batches([triplet], ROLES[:2], 2, replica=1, replicas=2, multiple=1)
    assert batch.num_triplets == 0 and batch.rows.tokens.shape == (4, length)
    assert batch.rows.targets.num_responses == 0 and batch.rows.targets.positions.shape == (0,)
    assert batch.lengths.shape == (0, 2) and batch.reference is None and batch.identical.shape == (0,)


def test_rows_are_only_as_long_as_the_computed_roles() -> None:
    long = Triplet("a", [1], {"annotated": [3], "synthetic": [4]})
    assert plan_micro_batches([long], ROLES[:2], 1, 0, 1, 1)[1] == 8
