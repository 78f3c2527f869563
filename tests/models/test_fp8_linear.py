"""The FP8 linears against products of dequantised matrices in float64, in every layout and both scalings."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from megatron_tspin.config import ParallelSection
from megatron_tspin.precision import TorchFp8
from tests.models.fp8_layers import (
    BATCH,
    DTYPES,
    KINDS,
    PRODUCTS,
    RECIPES,
    SEQUENCE,
    SETTINGS,
    compute,
    join,
    judge,
    kept_for_backward,
    make_layer,
    matrices,
    recorded_products,
    recorded_traffic,
    shard,
    splits,
    step,
)
from tests.rank_pool import in_layout

NOT_FINITE = ["nan", "inf", "-inf"]


def on_ranks(tp: int, sp: bool) -> dict[Any, Any]:
    """This rank's results by (kind, recipe, dtype), and where NaN was seen by (kind, recipe, which, bad).

    Everything of a layout at once: its process groups take longer to build than all of these layers to run.
    """
    from itertools import product

    with in_layout(ParallelSection(tensor_model_parallel_size=tp, sequence_parallel=sp)) as topology:
        shares = (tp, sp, topology.tp_rank)
        found: dict[Any, Any] = {}
        for kind, recipe, dtype in product(("column", "row"), SETTINGS, (torch.float32, torch.bfloat16)):
            found[kind, recipe, dtype] = products_of(kind, SETTINGS[recipe], matrices(), dtype, *shares)
        for kind, recipe, which, bad in product(("column", "row"), SETTINGS, range(3), NOT_FINITE):
            given = matrices()
            given[which].view(-1)[0] = float(bad)
            results, _ = products_of(kind, SETTINGS[recipe], given, torch.bfloat16, *shares)
            found[kind, recipe, which, bad] = [bool((value != value).any()) for value in results]
        return found


def products_of(kind: str, settings: TorchFp8, given: Any, dtype: torch.dtype, tp: int, sp: bool, rank: int) -> Any:
    """([output, input gradient, weight gradient], [operands of the three products]) of this rank."""
    parts = zip(given, splits(kind, sp), strict=True)
    states, weight, gradient = (shard(matrix.to(dtype), at, rank, tp) for matrix, at in parts)
    layer = make_layer(kind, settings, weight, tp, sp)
    states.requires_grad_()
    with recorded_products() as products, recorded_traffic() as gathered, kept_for_backward() as kept:
        output, bias = layer(states)
        output.backward(gradient)
    tokens = SEQUENCE * BATCH // tp
    assert [tensor.numel() for tensor in kept if tensor.dtype == settings.forward] == [states.numel()]
    assert all(tensor.dtype.itemsize == 1 or tensor.shape == (tokens, 1) for tensor in gathered), "only scales are fp32"
    assert any(tensor.dtype.itemsize == 1 for tensor in gathered) == sp
    assert bias is None and output.dtype == states.grad.dtype == layer.weight.grad.dtype == dtype
    results = output.detach(), states.grad, layer.weight.grad
    return [value.float().numpy() for value in results], products


@pytest.fixture(scope="module")
def in_layouts(ranks: Any) -> Callable[[int, bool], list[dict[Any, Any]]]:
    """What `on_ranks` returns, of every rank of a layout."""
    return cache(lambda tp, sp: ranks(tp).run(on_ranks, tp, sp))


LAYOUTS = pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, False), (2, True)], ids=["tp1", "tp2", "tp2-sp"])


@RECIPES
@LAYOUTS
@KINDS
@DTYPES
def test_products(kind: str, tp: int, sp: bool, recipe: str, dtype: torch.dtype, in_layouts: Any) -> None:
    found = [rank[kind, recipe, dtype] for rank in in_layouts(tp, sp)]
    given = [matrix.to(dtype) for matrix in matrices()]
    states_split, weight_split, output_split = splits(kind, sp) if tp > 1 else (None, None, None)
    # In bf16 the shares of TP are rounded before they are summed.
    precision = 1e-6 if dtype == torch.float32 else 2**-7
    for index, (name, split, expected) in enumerate(
        zip(PRODUCTS, (output_split, states_split, weight_split), judge(SETTINGS[recipe], *given), strict=True)
    ):
        value = join([results[index] for results, _ in found], split)
        error = (value.reshape(expected.shape) - expected).abs().max() / expected.abs().max()
        assert error < precision, f"{name}: {error}"


# Which dimension of the operands TP splits, after sequences are gathered: left and right of the three products.
OPERAND_SPLITS = {
    "column": [(None, 0), (1, 1), (0, None)],
    "row": [(1, 1), (None, 0), (None, 0)],
}


@RECIPES
@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
@KINDS
def test_tp_quantises_to_the_same_bits(kind: str, sp: bool, recipe: str, in_layouts: Any) -> None:
    case = kind, recipe, torch.bfloat16
    _, alone = in_layouts(1, False)[0][case]
    found = [rank[case][1] for rank in in_layouts(2, sp)]
    assert len(alone) == len(PRODUCTS)
    for product, name in enumerate(PRODUCTS):
        for side, split in enumerate(OPERAND_SPLITS[kind][product]):
            values, scales = ([rank[product][2 * side + part] for rank in found] for part in (0, 1))
            expected_values, expected_scale = (torch.from_numpy(alone[product][2 * side + part]) for part in (0, 1))
            assert join(values, split).equal(expected_values), f"{name}, operand {side}"
            scale_split = split if split == 0 and SETTINGS[recipe].rowwise else None
            assert join(scales, scale_split).equal(expected_scale), f"{name}, scale of operand {side}"


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["input", "weight", "gradient"])
@LAYOUTS
@RECIPES
@KINDS
def test_what_is_not_finite_stays_visible(
    kind: str, recipe: str, tp: int, sp: bool, which: int, bad: str, in_layouts: Any
) -> None:
    found = [rank[kind, recipe, which, bad] for rank in in_layouts(tp, sp)]
    seen = [any(rank[product] for rank in found) for product in range(3)]
    assert seen == [which != 2, which != 0, which != 1]


@pytest.mark.gpu
@RECIPES
@KINDS
@DTYPES
@pytest.mark.parametrize("tokens", [512, 500], ids=["512", "500, no multiple of 16"])
def test_products_on_a_gpu(kind: str, recipe: str, dtype: torch.dtype, tokens: int) -> None:
    settings = SETTINGS[recipe]
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = ((tokens, 1, 1024), (2048, 1024), (tokens, 1, 2048))
    given = [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]
    layer = make_layer(kind, settings, given[1])
    layer.weight.main_grad = torch.zeros(2048, 1024, device="cuda")
    input_gradient = step(layer, given[0], given[2])
    results = compute(layer, given[0]), input_gradient, layer.weight.main_grad
    # Row-wise products may come in bf16; fast sums in the tensor cores have about as many bits.
    for name, value, expected in zip(PRODUCTS, results, judge(settings, *given), strict=True):
        error = (value.reshape(expected.shape) - expected).abs().max() / expected.abs().max()
        assert error < 2**-7, f"{name}: {error}"
