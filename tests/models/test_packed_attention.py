"""Backends of packed attention against softmax written out, in value and gradient."""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_tspin.models import packed_attention
from megatron_tspin.models.packed_attention import BACKENDS, choose_backend
from megatron_tspin.models.row_layout import Bundle, ContextShare, RowLayout
from megatron_tspin.models.scores import Scores
from tests.row_bundles import layout_of, rows_of_bundles, sees, tokens_of

DIM, SCALE = 8, 0.4
# Prompts alone, responses of no token in the row, single-token prompts, several bundles.
ROW = [Bundle(5, (4, 0, 7)), Bundle(1, (3,)), Bundle(6, (0, 0)), Bundle(1, (0,)), Bundle(9, (6, 6, 6))]

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(length: int, heads: int, key_groups: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and the gradient that arrives."""
    generator = torch.Generator().manual_seed(length * heads + key_groups)
    return tuple(
        torch.randn(length, n, DIM, generator=generator).to(dtype) for n in (heads, key_groups, key_groups, heads)
    )


def attend(name: str, layout: RowLayout, given: tuple[torch.Tensor, ...], window: int | None = None) -> Result:
    """Output and gradients of a backend for this rank's queries; the gradient at padding is zero."""
    query, key, value, gradient = (each.detach() for each in given)
    query, key, value = (
        query[layout.held].requires_grad_(),
        key.clone().requires_grad_(),
        value.clone().requires_grad_(),
    )
    out = BACKENDS[name](query, key, value, layout, Scores(SCALE, window))
    out.backward(gradient[layout.held] * real(layout)[layout.held, None, None])
    assert query.grad is not None and key.grad is not None and value.grad is not None
    return out.detach(), query.grad, key.grad, value.grad


def real(layout: RowLayout) -> torch.Tensor:
    return torch.tensor([token.bundle >= 0 for token in tokens_of(layout)])


def written_out(layout: RowLayout, given: tuple[torch.Tensor, ...], window: int | None = None) -> Result:
    """The whole row, head by head in float64, with the rule of a packed row token by token."""
    query, key, value, gradient = (each.double() for each in given)
    query, key, value = query.requires_grad_(), key.requires_grad_(), value.requires_grad_()
    row, everything = tokens_of(layout), range(layout.length)
    mask = torch.tensor([[sees(row, q, k, window) for k in everything] for q in everything])
    heads = []
    for head in range(query.shape[1]):
        key_group = head * key.shape[1] // query.shape[1]
        scores = SCALE * query[:, head] @ key[:, key_group].t()
        heads.append(torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=1) @ value[:, key_group])
    out = torch.stack(heads, dim=1)
    out.backward(gradient * real(layout)[:, None, None])
    assert query.grad is not None and key.grad is not None and value.grad is not None
    return out.detach(), query.grad, key.grad, value.grad


def assert_near(found: Result, expected: Result, layout: RowLayout, tolerance: float) -> None:
    """Relative to the largest entry, or to 1 if that is smaller. What comes out at padding is nobody's business."""
    keep = real(layout)
    for name, one, other in zip(("output", "query", "key", "value"), found, expected, strict=True):
        if name in ("output", "query"):
            one, other = one[keep[layout.held]], other[layout.held][keep[layout.held]]
        worst = (one.double() - other).abs().max().item() if one.numel() else 0.0
        scale = max(1.0, other.abs().max().item()) if one.numel() else 1.0
        assert worst < tolerance * scale, f"{name}: {worst:.1e} of {scale:.1e}"


@pytest.mark.parametrize("window", [None, 50, 21, 20, 7, 1], ids=lambda value: f"window {value}")
@pytest.mark.parametrize("key_groups", [4, 2, 1], ids=lambda value: f"{value} key groups")
@pytest.mark.parametrize("name", ["segments", "dense"])
def test_values_and_gradients(name: str, key_groups: int, window: int | None) -> None:
    """4 query heads over 4, 2 and one KV head; the longest sequence of the row has 15 tokens."""
    layout = layout_of(ROW, ContextShare(), spare=3)
    given_tensors = tensors(layout.length, 4, key_groups)
    expected = written_out(layout, given_tensors, window)
    assert_near(attend(name, layout, given_tensors, window), expected, layout, 2e-6)


def test_a_window_that_every_sequence_fits_into_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(ROW, ContextShare())
    assert layout.longest_sequence == 15
    refuse: Any = None
    monkeypatch.setattr(packed_attention, "dense_attention", refuse)
    given_tensors = tensors(layout.length, 2, 2)
    attend("segments", layout, given_tensors, 15)
    with pytest.raises(TypeError):
        attend("segments", layout, given_tensors, 14)


@settings(max_examples=40)
@given(bundles=rows_of_bundles, spare=st.integers(0, 2), heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]))
@example(bundles=[], spare=1, heads=(1, 1))  # a row of padding alone: a replica without a triplet
def test_any_row(bundles: list[Bundle], spare: int, heads: tuple[int, int]) -> None:
    layout = layout_of(bundles, ContextShare(), spare)
    given_tensors = tensors(layout.length, *heads)
    found = attend("segments", layout, given_tensors)
    if bundles:
        assert_near(found, written_out(layout, given_tensors), layout, 3e-6)
    assert all(each.isfinite().all() for each in found)
    assert not found[1][~real(layout)].any(), "padding has a gradient"


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("name", ["segments", "dense"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_share_a_row(size: int, name: str, window: int | None) -> None:
    """Each holds some queries and sees all keys; the keys' gradients are the sum over ranks."""
    whole = layout_of(ROW, ContextShare(0, size), spare=1)
    given_tensors = tensors(whole.length, 4, 2)
    expected = written_out(RowLayout(bundles=whole.bundles, length=whole.length), given_tensors, window)
    layouts = [layout_of(ROW, ContextShare(rank, size), spare=1) for rank in range(size)]
    parts = [attend(name, layout, given_tensors, window) for layout in layouts]
    for_keys, for_values = (torch.stack([part[i] for part in parts]).sum(dim=0) for i in (2, 3))
    for layout, (out, for_queries, _, _) in zip(layouts, parts, strict=True):
        assert_near((out, for_queries, for_keys, for_values), expected, layout, 2e-6)


@pytest.mark.parametrize("name", ["segments", "dense"])
def test_bf16_is_near(name: str) -> None:
    layout = layout_of(ROW, ContextShare())
    given_tensors = tensors(layout.length, 4, 2, torch.bfloat16)
    assert_near(attend(name, layout, given_tensors), written_out(layout, given_tensors), layout, 0.02)


def test_extreme_scores_do_not_overflow() -> None:
    """Blocks are joined by their log-sum-exp, thousands apart here."""
    layout = layout_of([Bundle(3, (4,))], ContextShare())
    query, key, value, gradient = tensors(layout.length, 2, 2)
    given_tensors = (200 * query, 20 * key, value, gradient)
    found, expected = attend("segments", layout, given_tensors), written_out(layout, given_tensors)
    assert all(each.isfinite().all() for each in found)
    assert_near(found, expected, layout, 1e-3)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "key_groups"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("share", [ContextShare(), ContextShare(1, 2)], ids=["whole row", "half a row"])
def test_flex_forward(share: ContextShare, heads: int, key_groups: int, window: int | None) -> None:
    """Not compiled: on a CPU FlexAttention has no backward."""
    layout = layout_of(ROW, share, spare=1)
    query, key, value, _ = tensors(layout.length, heads, key_groups)
    with torch.no_grad():
        found = BACKENDS["flex"](query[layout.held], key, value, layout, Scores(SCALE, window))
        expected = BACKENDS["dense"](query[layout.held], key, value, layout, Scores(SCALE, window))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_each_device_has_its_backend() -> None:
    assert choose_backend("auto", torch.device("cpu")) == "segments"
    assert choose_backend("auto", torch.device("cuda")) == "flex"
    assert choose_backend("dense", torch.device("cuda")) == "dense"
    assert choose_backend("auto", torch.device("cuda"), engine=True, share_prompts=False) == "thd"
    assert choose_backend("auto", torch.device("cuda"), engine=True) == "flex"
    assert choose_backend("auto", torch.device("cpu"), engine=True, share_prompts=False) == "segments"


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize(("heads", "key_groups"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flex_on_a_gpu(dtype: torch.dtype, heads: int, key_groups: int, window: int | None) -> None:
    """Compiled, with backward, over blocks of the mask that are empty, full and mixed."""
    bundles = [Bundle(150, (90, 1, 0)), Bundle(1, (300,)), Bundle(40, (0, 0, 700))]
    for share in (ContextShare(), ContextShare(0, 2), ContextShare(1, 2)):
        layout = layout_of(bundles, share, spare=64)
        generator = torch.Generator().manual_seed(0)
        shapes = ((len(layout.held), heads), (layout.length, key_groups), (layout.length, key_groups))
        made = [torch.randn(*shape, 64, generator=generator) for shape in shapes]
        gradient = torch.randn(made[0].shape, generator=generator) * real(layout)[layout.held, None, None]
        results = []
        for name, kind, device in (("flex", dtype, "cuda"), ("dense", torch.float64, "cpu")):
            query, key, value = (each.to(dtype).to(device, kind).requires_grad_() for each in made)
            out = BACKENDS[name](query, key, value, layout, Scores(0.125, window))
            out.backward(gradient.to(dtype).to(device, kind))
            results.append([each.detach().cpu().double() for each in (out, query.grad, key.grad, value.grad)])
        keep = real(layout)[layout.held]
        for name, one, other in zip(("output", "query", "key", "value"), *results, strict=True):
            if name in ("output", "query"):
                one, other = one[keep], other[keep]
            error = (one - other).norm() / other.norm()
            assert error < (0.02 if dtype == torch.bfloat16 else 3e-3), f"{name}: {error:.1e}"  # TF32 in fp32
