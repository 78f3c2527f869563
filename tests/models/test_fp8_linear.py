"""The FP8 linears against products of dequantised matrices in float64, in every layout and both scalings."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from rank_pool import in_layout

from megatron_tspin.config import ParallelSection
from megatron_tspin.errors import InputError
from megatron_tspin.precision import TorchFp8

SEQUENCE, BATCH, INPUTS, OUTPUTS = 10, 2, 32, 64
"""20 tokens, 10 a rank under sequence parallelism: no multiples of 16."""
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SETTINGS = {
    f"{name}-{'rowwise' if rowwise else 'tensorwise'}": TorchFp8(E4M3, backward, rowwise)
    for name, backward in (("hybrid", E5M2), ("e4m3", E4M3))
    for rowwise in (False, True)
}
RECIPES = pytest.mark.parametrize("recipe", SETTINGS)
BOTH = pytest.mark.parametrize(
    "settings", [SETTINGS["hybrid-tensorwise"], SETTINGS["hybrid-rowwise"]], ids=["tensorwise", "rowwise"]
)
HYBRID = SETTINGS["hybrid-tensorwise"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
KINDS = pytest.mark.parametrize("kind", ["column", "row"])
NOT_FINITE = ["nan", "inf", "-inf"]
PRODUCTS = ("output", "input gradient", "weight gradient")


def matrices(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input [s, b, k], weight [n, k], gradient of the output [s, b, n]; sizes differ by row and by column."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> torch.Tensor:
        by_row, by_column = (torch.randn(n, generator=generator).exp() for n in (rows, columns))
        return torch.randn(rows, columns, generator=generator) * by_row[:, None] * by_column

    tokens = SEQUENCE * BATCH
    states, weight, gradient = draw(tokens, INPUTS), draw(OUTPUTS, INPUTS), draw(tokens, OUTPUTS)
    return states.view(SEQUENCE, BATCH, -1), weight, gradient.view(SEQUENCE, BATCH, -1)


def make_layer(
    kind: str, settings: TorchFp8, weight: torch.Tensor, tp: int = 1, sp: bool = False, **options: Any
) -> Any:
    """A layer of as many inputs and outputs as TP ranks with this weight have."""
    from megatron.core import ModelParallelConfig

    from megatron_tspin.models.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear

    config: Any = ModelParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=sp,
        params_dtype=weight.dtype,
        use_cpu_initialization=not weight.is_cuda,
        perform_initialization=False,
    )
    config.torch_fp8 = settings
    own = {"gather_output": False} if kind == "column" else {"input_is_parallel": True}
    outputs, inputs = weight.shape
    sizes = (inputs, outputs * tp) if kind == "column" else (inputs * tp, outputs)
    make = Fp8ColumnParallelLinear if kind == "column" else Fp8RowParallelLinear
    arguments: dict[str, Any] = {"bias": False, "skip_bias_add": False, "tp_comm_buffer_name": "fc1"} | own | options
    layer: Any = make(*sizes, config=config, init_method=torch.nn.init.zeros_, **arguments)
    layer.weight.data.copy_(weight)
    return layer


@contextmanager
def recorded_products() -> Iterator[list[Any]]:
    """The operands of each product as (left values, left scale, right values, right scale) ."""
    from megatron_tspin.models import fp8_linear

    original, found = fp8_linear.matmul_transposed, []

    def record(left: Any, right: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        found.append([part.float().numpy() for x in (left, right) for part in (x.values, x.inverse_scale)])
        return original(left, right, *args, **kwargs)

    with patch.object(fp8_linear, "matmul_transposed", record):
        yield found


@contextmanager
def recorded_traffic() -> Iterator[list[torch.Tensor]]:
    """What this rank gives to gathers."""
    from megatron_tspin.models import fp8_linear

    original, found = fp8_linear._gather, []

    def record(part: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(part)
        return original(part, *args, **kwargs)

    with patch.object(fp8_linear, "_gather", record):
        yield found


@contextmanager
def kept_for_backward() -> Iterator[list[torch.Tensor]]:
    """What autograd is asked to keep."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def shard(matrix: torch.Tensor, dimension: int | None, rank: int, tp: int) -> torch.Tensor:
    return matrix if dimension is None else matrix.chunk(tp, dimension)[rank].clone()


def splits(kind: str, sp: bool) -> tuple[int | None, int, int | None]:
    """Which dimension of input, weight and output TP splits."""
    sequence = 0 if sp else None
    return (sequence, 0, 2) if kind == "column" else (2, 1, sequence)


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


def dequantised(matrix: torch.Tensor, along: int, dtype: torch.dtype, settings: TorchFp8) -> torch.Tensor:
    """What the matrix is after quantisation, float64."""
    magnitudes = matrix.float().abs()
    amax = magnitudes.amax(along, keepdim=True) if settings.rowwise else magnitudes.max()
    scale = amax * (2.0**settings.margin / torch.finfo(dtype).max)
    return (matrix.float() / scale).to(dtype).double() * scale.double()


def judge(
    settings: TorchFp8, states: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three products in float64, as matrices."""
    x, g = states.flatten(0, 1), gradient.flatten(0, 1)
    forward, backward = settings.forward, settings.backward
    return (
        dequantised(x, 1, forward, settings) @ dequantised(weight, 1, forward, settings).t(),
        dequantised(g, 1, backward, settings) @ dequantised(weight, 0, forward, settings),
        dequantised(g, 0, backward, settings).t() @ dequantised(x, 0, forward, settings),
    )


def join(parts: list[Any], dimension: int | None) -> torch.Tensor:
    tensors = [torch.from_numpy(part) for part in parts]
    if dimension is not None:
        return torch.cat(tensors, dimension)
    assert all(part.equal(tensors[0]) for part in tensors), "ranks differ in what each has whole"
    return tensors[0]


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


def compute(layer: Any, states: torch.Tensor) -> torch.Tensor:
    """What our part of the layer computes; megatron-core's needs a process group also for a single rank."""
    output: torch.Tensor = layer._forward_impl(input=states, weight=layer.weight)
    return output


def step(layer: Any, states: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Input gradient of one forward and backward pass."""
    leaf = states.clone().requires_grad_()
    compute(layer, leaf).backward(gradient)
    assert leaf.grad is not None
    return leaf.grad


@BOTH
@KINDS
def test_margin(kind: str, settings: TorchFp8) -> None:
    from dataclasses import replace

    states, weight, gradient = matrices()
    wide = replace(settings, margin=2)
    layer = make_layer(kind, wide, weight)
    with recorded_products() as products:
        step(layer, states, gradient)
    for (left, _, right, _), left_type in zip(products, (E4M3, E5M2, E5M2), strict=True):
        assert abs(left).max() == torch.finfo(left_type).max / 4
        assert abs(right).max() == torch.finfo(E4M3).max / 4
    expected = judge(wide, states, weight, gradient)[2]
    assert (layer.weight.grad - expected).abs().max() < 1e-6 * expected.abs().max()


@BOTH
@KINDS
def test_the_weight_is_quantised_once_a_step(kind: str, settings: TorchFp8) -> None:
    """Until the flag is raised, whatever happens to the weight: `.data` changes without anyone's notice."""
    from megatron_tspin.models.fp8_linear import weights_changed

    states, weight, gradient = matrices()
    layer = make_layer(kind, settings, weight)
    assert layer.is_first_microbatch is True, "megatron-core looks for this attribute"
    with torch.no_grad():
        before = compute(layer, states)
    layer.weight.data.mul_(2).neg_()
    assert compute(layer, states).equal(before)
    assert layer.is_first_microbatch is False
    first = step(layer, states, gradient)
    layer.weight.data.neg_()
    assert step(layer, states, gradient).equal(first)
    weights_changed(torch.nn.ModuleList([layer]))
    assert compute(layer, states).equal(2 * before)
    layer.weight.data.neg_()
    layer.is_first_microbatch = True
    assert step(layer, states, gradient).equal(-_doubled(kind, settings))
    with torch.no_grad():
        assert compute(layer, states).equal(-2 * before)


def _doubled(kind: str, settings: TorchFp8) -> torch.Tensor:
    states, weight, gradient = matrices()
    return step(make_layer(kind, settings, 2 * weight), states, gradient)


@BOTH
def test_recomputing_quantises_the_weight_once(settings: TorchFp8) -> None:
    from torch.utils.checkpoint import checkpoint

    from megatron_tspin.models import fp8_linear

    states, weight, gradient = matrices()
    plain = make_layer("column", settings, weight)
    expected = step(plain, states, gradient)
    layer = make_layer("column", settings, weight)
    leaf = states.clone().requires_grad_()
    calls: list[Any] = []

    def count(matrix: torch.Tensor, *args: Any) -> Any:
        calls.append(matrix.shape == weight.shape)
        return quantize(matrix, *args)

    quantize = fp8_linear.quantize
    with patch.object(fp8_linear, "quantize", count):
        for _ in range(2):
            checkpoint(lambda x: compute(layer, x), leaf, use_reentrant=True).backward(gradient)
    assert leaf.grad is not None and leaf.grad.equal(2 * expected)
    assert layer.weight.grad.equal(2 * plain.weight.grad)
    assert sum(calls) == (2 if settings.rowwise else 1), "row-wise there are two products, each with its own scales"


@BOTH
@KINDS
def test_weight_gradients_are_summed_in_main_grad(kind: str, settings: TorchFp8) -> None:
    states, weight, gradient = (matrix.bfloat16() for matrix in matrices())
    more_states, _, more_gradient = (matrix.bfloat16() for matrix in matrices(seed=1))
    layer = make_layer(kind, settings, weight)
    layer.weight.main_grad = torch.ones(OUTPUTS, INPUTS)
    layer.weight.grad_added_to_main_grad = False
    hooked = []
    layer.weight.register_hook(hooked.append)
    step(layer, states, gradient)
    assert layer.weight.grad_added_to_main_grad is True, "else megatron-core's DDP would add the dummy"
    step(layer, more_states, more_gradient)
    assert len(hooked) == 2, "megatron-core's DDP waits for the hook"
    expected = judge(settings, states, weight, gradient)[2] + judge(settings, more_states, weight, more_gradient)[2]
    # As fp32 has it, not as bf16 would round it.
    assert (layer.weight.main_grad - 1 - expected).abs().max() < 1e-6 * expected.abs().max()


@BOTH
def test_what_is_kept_for_backward_is_fp8(settings: TorchFp8) -> None:
    states, weight, gradient = (matrix.bfloat16() for matrix in matrices())
    layer = make_layer("column", settings, weight)
    with kept_for_backward() as kept:
        output = compute(layer, states.requires_grad_())
    activations = [tensor for tensor in kept if tensor.data_ptr() != layer.weight.data_ptr()]
    assert sorted(t.dtype.itemsize for t in activations if t.numel() > INPUTS) == [1]
    assert sum(t.nbytes for t in activations) <= states.numel() + 4 * INPUTS
    output.backward(gradient)


@BOTH
def test_without_gradient_no_transpose_is_made(settings: TorchFp8) -> None:
    states, weight, _ = matrices()
    layer = make_layer("row", settings, weight)
    expected = compute(layer, states)
    layer.is_first_microbatch = True
    with torch.no_grad():
        assert compute(layer, states).equal(expected)
    assert layer._operands.backward is None


@BOTH
@KINDS
def test_a_frozen_weight_has_no_gradient(kind: str, settings: TorchFp8) -> None:
    states, weight, gradient = matrices()
    expected = step(make_layer(kind, settings, weight), states, gradient)
    layer = make_layer(kind, settings, weight)
    layer.weight.requires_grad_(False)
    assert step(layer, states, gradient).equal(expected)
    assert layer.weight.grad is None


@pytest.mark.parametrize("which", [0, 1, 2], ids=["input", "weight", "gradient"])
@BOTH
@KINDS
def test_zeros(kind: str, settings: TorchFp8, which: int) -> None:
    given = list(matrices())
    given[which] = torch.zeros_like(given[which])
    states, weight, gradient = given
    layer = make_layer(kind, settings, weight)
    input_gradient = step(layer, states, gradient)
    output = compute(layer, states)
    results = (output, input_gradient, layer.weight.grad)
    assert all(value.isfinite().all() for value in results)
    assert [bool(value.any()) for value in results] == [which == 2, which == 0, which == 1]


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


def refusal(kind: str, tp: int, shape: tuple[int, int]) -> None:
    with in_layout(ParallelSection(tensor_model_parallel_size=tp)):
        make_layer(kind, HYBRID, torch.zeros(shape), tp)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("shape", "says"), [((24, 32), "24 outputs"), ((32, 40), "40 inputs")], ids=["outputs", "inputs"]
)
@KINDS
def test_sizes_are_refused(kind: str, shape: tuple[int, int], says: str, tp: int, ranks: Any) -> None:
    with pytest.raises(InputError, match=f"linear fc1: {says} a rank at TP {tp}.*multiple of 16"):
        ranks(tp).run(refusal, kind, tp, shape)


@KINDS
def test_a_bias_is_refused(kind: str) -> None:
    with pytest.raises(InputError, match="linear fc1: has a bias"):
        make_layer(kind, HYBRID, torch.zeros(32, 32), bias=True)


@KINDS
def test_checkpoints_hold_the_weight_alone(kind: str) -> None:
    layer = make_layer(kind, HYBRID, matrices()[1])
    compute(layer, matrices()[0])
    assert {name for name, value in layer.state_dict().items() if value is not None} == {"weight"}


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
