"""FP8 linears and what they are judged by: products of dequantised matrices in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch

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
    """A layer with the numbers of inputs and outputs that TP ranks with this weight have."""
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
