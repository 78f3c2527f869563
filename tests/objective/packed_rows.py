"""Random triplets, and packed rows put together again from what their ranks hold."""

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from megatron_tspin.models.row_layout import RowLayout
from megatron_tspin.objective.batches import Triplet
from megatron_tspin.objective.roles import ROLES
from megatron_tspin.objective.rows import Rows
from tests.row_bundles import sees, tokens_of

token = st.integers(1, 90)
ids = st.lists(token, min_size=1, max_size=12)
pair = st.tuples(ids, ids)


@st.composite
def triplet_lists(draw: Any) -> list[Triplet]:
    """y' = y in some, y0 = y' in some, and references that tell every response from every other one."""
    made = []
    for index in range(draw(st.integers(1, 9))):
        prompt, annotated = draw(pair)
        synthetic = annotated if draw(st.booleans()) else draw(pair)[1]
        proto = synthetic if draw(st.booleans()) else draw(pair)[1]
        responses = dict(zip(ROLES, (annotated, synthetic, proto), strict=True))
        reference = {role: -float(index) - i / 4 for i, role in enumerate(ROLES)}
        made.append(Triplet(str(index), prompt, responses, reference))
    return made


def whole_row(parts: Sequence[Rows]) -> tuple[RowLayout, list[int], list[int]]:
    """Layout of the row, its tokens and position ids, from the parts of all CP ranks in order."""
    layouts = [part.layout for part in parts]
    first = layouts[0]
    assert first is not None
    tokens, positions = [-1] * first.length, [-1] * first.length
    for part, layout in zip(parts, layouts, strict=True):
        assert layout is not None and (layout.bundles, layout.length) == (first.bundles, first.length)
        assert part.tokens.shape == part.position_ids.shape == (1, first.length // len(parts))
        for at, token_id, position in zip(layout.held.tolist(), part.tokens[0], part.position_ids[0], strict=True):
            tokens[at], positions[at] = int(token_id), int(position)
    return first, tokens, positions


def contexts_of_targets(parts: Sequence[Rows]) -> dict[int, list[tuple[list[int], int]]]:
    """By response: each token to predict, behind all tokens that its predicting position sees, in order of position.

    Knows nothing of how rows are made: what a position sees is worked out by the rule of a packed row.
    """
    layout, tokens, positions = whole_row(parts)
    row = tokens_of(layout)
    found: dict[int, list[tuple[list[int], int]]] = {}
    for part in parts:
        assert part.layout is not None
        held = part.layout.held.tolist()
        targets = part.targets
        for here, token_id, owner in zip(
            targets.positions.tolist(), targets.token_ids.tolist(), targets.response_index.tolist(), strict=True
        ):
            seen = [key for key in range(layout.length) if sees(row, held[here], key)]
            assert [positions[key] for key in seen] == list(range(len(seen)))
            found.setdefault(owner, []).append(([tokens[key] for key in seen], token_id))
    return {owner: sorted(contexts, key=lambda context: len(context[0])) for owner, contexts in found.items()}


def responses_in(parts: Sequence[Rows]) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of every response, checking that each token is predicted from all that comes before it."""
    contexts = contexts_of_targets(parts)
    assert sorted(contexts) == list(range(parts[0].targets.num_responses))
    found = []
    for owner in range(len(contexts)):
        prompt = contexts[owner][0][0]
        response = [token_id for _, token_id in contexts[owner]]
        expected = [(prompt + response[:place], token_id) for place, token_id in enumerate(response)]
        assert contexts[owner] == expected, "a token was skipped, predicted twice, or from the wrong tokens"
        found.append((prompt, response))
    return found
