"""Core attention against the softmax written out, with key groups, windows and the key-value cache."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_tspin.models.attention import CausalAttention, window_mask
from megatron_tspin.models.norms import RMSNorm
from megatron_tspin.models.row_layout import Bundle, RowLayout
from megatron_tspin.models.scores import Scores

HEADS, DIM = 4, 8


def attention(
    window: int | None = None, scale: float | None = None, packed: str = "segments", cap: float | None = None
) -> CausalAttention:
    scores = Scores(DIM**-0.5 if scale is None else scale, window, cap)
    return CausalAttention(SimpleNamespace(packed_attention=packed), 1, scores)


def tensors(length: int, key_groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length + key_groups)
    query, key, value = (torch.randn(length, 2, n, DIM, generator=generator) for n in (HEADS, key_groups, key_groups))
    return query, key, value


def written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    scale: float,
    cap: float | None = None,
) -> torch.Tensor:
    length, batch = query.shape[:2]
    out = torch.zeros(length, batch, HEADS, DIM)
    for i in range(length):
        first = 0 if window is None else max(0, i - window + 1)
        for head in range(HEADS):
            key_group = head // (HEADS // key.shape[2])
            for row in range(batch):
                keys = key[first : i + 1, row, key_group]
                scores = scale * keys @ query[i, row, head]
                weights = torch.softmax(scores if cap is None else cap * torch.tanh(scores / cap), dim=0)
                out[i, row, head] = weights @ value[first : i + 1, row, key_group]
    return out.reshape(length, batch, -1)


@pytest.mark.parametrize("key_groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
@pytest.mark.parametrize("cap", [None, 0.5])
def test_rows_are_causal(window: int | None, key_groups: int, cap: float | None) -> None:
    query, key, value = tensors(7, key_groups)
    found = attention(window, cap=cap)(query, key, value)
    assert torch.allclose(found, written_out(query, key, value, window, DIM**-0.5, cap), atol=1e-6)


def test_scale_is_the_configured_one() -> None:
    query, key, value = tensors(4, 2)
    assert torch.allclose(attention(None, 0.9)(query, key, value), written_out(query, key, value, None, 0.9), atol=1e-6)


@pytest.mark.parametrize("key_groups", [1, 4])
@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("packed", ["segments", "dense", "flex"])
@pytest.mark.parametrize("cap", [None, 0.5])
def test_a_sequence_in_a_packed_row_is_causal(
    cap: float | None, packed: str, window: int | None, key_groups: int
) -> None:
    """A prompt of 3 and a response of 4 behind another sequence: what they give alone in a row."""
    query, key, value = (each[:, :1] for each in tensors(16, key_groups))
    layout = RowLayout(bundles=(Bundle(2, (4,)), Bundle(3, (4,))), length=16)
    found = attention(window, 0.9, packed, cap)(query, key, value, packed_seq_params=layout)
    assert found.shape == (16, 1, HEADS * DIM)
    for start, end in ((0, 6), (6, 13)):
        part = written_out(*(each[start:end].expand(-1, 2, -1, -1) for each in (query, key, value)), window, 0.9, cap)
        assert torch.allclose(found[start:end], part[:, :1], atol=1e-6)


def test_masks_of_a_row_are_those_of_each_layer() -> None:
    """A full layer after a windowed one, over the same row."""
    query, key, value = (each[:, :1] for each in tensors(12, 2))
    layout = RowLayout(bundles=(Bundle(4, (4, 4)),), length=12)
    for packed in ("dense", "flex"):
        alone = attention(None, packed=packed)(query, key, value, packed_seq_params=layout)
        layout = RowLayout(bundles=(Bundle(4, (4, 4)),), length=12)
        windowed = attention(2, packed=packed)(query, key, value, packed_seq_params=layout)
        assert attention(None, packed=packed)(query, key, value, packed_seq_params=layout).equal(alone)
        assert not windowed.allclose(alone)


def test_window_mask() -> None:
    assert window_mask(2, 4, 2, torch.device("cpu"))[0, 0].int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert window_mask(4, 4, 2, torch.device("cpu"))[0, 0].int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    ours: Any = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=True), 16, eps=1e-3)
    theirs = LlamaRMSNorm(16, eps=1e-3).to(dtype)
    weight = torch.randn(16, generator=torch.Generator().manual_seed(0)).to(dtype)
    hidden = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
    assert ours(hidden).equal(theirs(hidden))
    assert ours.weight.sequence_parallel is True
