"""Which rows Transformer Engine's attention takes, how they are described to it, and on a GPU what it computes."""

import pytest
import torch

from megatron_tspin.models.packed_attention import BACKENDS
from megatron_tspin.models.row_layout import Bundle, ContextShare
from megatron_tspin.models.scores import Scores
from megatron_tspin.models.te_attention import fits, sequence_starts
from tests.row_bundles import layout_of

ORDINARY = [Bundle(5, (4,)), Bundle(1, (0,)), Bundle(3, (0, 9)), Bundle(7, ())]


def test_sequences_and_padding() -> None:
    layout = layout_of(ORDINARY, ContextShare(), spare=3)
    starts, longest = sequence_starts(layout, torch.device("cpu"))
    assert starts.tolist() == [0, 9, 10, 22, 29, layout.length]
    assert starts.dtype == torch.int32
    assert longest == 12
    full = layout_of([Bundle(16, (16,))], ContextShare(), spare=0)
    assert sequence_starts(full, torch.device("cpu")) == (pytest.approx([0, 32]), 32)


def test_rows_that_it_takes() -> None:
    assert fits(layout_of(ORDINARY, ContextShare()))
    assert not fits(layout_of([*ORDINARY, Bundle(2, (1, 1))], ContextShare()))
    assert not fits(layout_of(ORDINARY, ContextShare(0, 2)))


def test_other_rows_go_to_flex() -> None:
    layout = layout_of([Bundle(5, (4, 3)), Bundle(2, (3,))], ContextShare())
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(layout.length, n, 8, generator=generator) for n in (4, 2, 2))
    found, expected = (BACKENDS[name](query, key, value, layout, Scores(0.3)) for name in ("thd", "dense"))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.te
@pytest.mark.parametrize("window", [None, 100])
def test_against_dense_on_a_gpu(window: int | None) -> None:
    pytest.importorskip("transformer_engine.pytorch")
    layout = layout_of([Bundle(150, (90,)), Bundle(1, (300,)), Bundle(40, (0, 411))], ContextShare(), spare=40)
    generator = torch.Generator().manual_seed(0)
    real = torch.zeros(layout.length, 1, 1, device="cuda")
    real[: sum(bundle.tokens for bundle in layout.bundles)] = 1.0
    made = [torch.randn(layout.length, heads, 64, generator=generator) for heads in (4, 2, 2, 4)]
    results = []
    for name in ("thd", "dense"):
        dtype = torch.bfloat16 if name == "thd" else torch.float32
        query, key, value, gradient = (each.bfloat16().to("cuda", dtype) for each in made)
        inputs = [each.requires_grad_() for each in (query, key, value)]
        out = BACKENDS[name](*inputs, layout, Scores(0.125, window))  # type: ignore[call-arg]
        out.backward(gradient * real.to(dtype))
        results.append([out.detach() * real, *(each.grad for each in inputs)])
    for found, expected in zip(*results, strict=True):
        assert ((found.float() - expected.float()).norm() / expected.float().norm()).item() < 1e-2
