"""Backends of attention over packed rows: errors against float64, and times beside padded rows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_tspin.benchmark.gpu_report.check import TIMES, Case, Figures, Meaning, SkippedError
from megatron_tspin.benchmark.gpu_report.te import relative
from megatron_tspin.benchmark.lengths import draw_lengths
from megatron_tspin.benchmark.stopwatch import measure
from megatron_tspin.models.packed_attention import BACKENDS
from megatron_tspin.models.row_layout import Bundle, RowLayout
from megatron_tspin.models.scores import Scores
from megatron_tspin.objective.packing import Shape
from megatron_tspin.platform import device, has_cuda, prepare_platform

_ERROR = "norm of the difference from `dense` in float64, over the norm of the latter; padding left out: "
FIGURES = {
    "out": Meaning("", _ERROR + "the result"),
    "dq": Meaning("", _ERROR + "gradient of the queries"),
    "dk": Meaning("", _ERROR + "gradient of the keys"),
    "dv": Meaning("", _ERROR + "gradient of the values"),
    "forward_ms": Meaning("ms", "forward alone, with gradients wanted; median"),
    **TIMES,
    "tokens": Meaning("", "tokens of the row; of padded rows, theirs with padding"),
}
_MULTIPLE = 32
_THD = "thd"
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class _Heads:
    """Query heads, key-value heads and their size."""

    queries: int
    groups: int
    size: int

    def __str__(self) -> str:
        return f"{self.queries}/{self.groups}x{self.size}"


@dataclass(frozen=True)
class _Sizes:
    heads: tuple[_Heads, ...]
    exact_triplets: int
    exact_length: int
    timed_triplets: int
    timed_length: int
    window: int
    seconds: float


_FULL = _Sizes((_Heads(32, 8, 128), _Heads(9, 3, 64)), 3, 768, 8, 2048, 256, 0.5)
_REDUCED = _Sizes((_Heads(4, 2, 16),), 2, 64, 2, 128, 16, 0.1)


def cases(reduced: bool) -> list[Case]:
    """Errors of each backend, then times; `thd` and what it is compared with on rows whose prompts are not shared."""
    sizes = _REDUCED if reduced else _FULL
    own = "flex" if has_cuda() else "segments"
    exact = ((own, None), (own, sizes.window), ("dense", None))
    kinds = [
        *((name, dtype, window) for dtype in _TYPES for name, window in exact),
        *((_THD, torch.bfloat16, window) for window in (None, sizes.window)),
    ]
    errors = [
        Case(
            f"{name} {_TYPES[dtype]} {heads}{' window' if window else ''}",
            partial(_errors, name, heads, dtype, window, sizes),
        )
        for heads in sizes.heads
        for name, dtype, window in kinds
    ]
    times = [
        Case(f"time {name}, prompts {'' if shared else 'not '}shared", partial(_packed_time, name, shared, sizes))
        for name, shared in ((own, True), ("dense", True), (own, False), (_THD, False))
    ]
    return [*errors, *times, Case("time SDPA flash, padded rows", partial(_padded_time, sizes))]


def _require(name: str) -> None:
    if name == _THD and find_spec("transformer_engine") is None:
        raise SkippedError("Transformer Engine is not installed")
    if name == _THD and not has_cuda():
        raise SkippedError("no CUDA device")
    prepare_platform()


def _errors(name: str, heads: _Heads, dtype: torch.dtype, window: int | None, sizes: _Sizes) -> Figures:
    _require(name)
    torch.backends.cuda.matmul.allow_tf32 = False
    layout = _layout(draw_lengths("ultrachat", sizes.exact_triplets, sizes.exact_length, seed=1), name != _THD)
    real = (layout.token_facts(device())[0] >= 0)[:, None, None]
    inputs = [each.to(dtype) for each in _inputs(layout.length, heads)]
    inputs[3] = inputs[3] * real
    with sdpa_kernel(SDPBackend.MATH):
        expected = _attend("dense", [each.double() for each in inputs], layout, window)
    found = _attend(name, inputs, layout, window)
    # Keys and values of padding count too: their gradients are zero.
    errors = [relative(one * real, other * real) for one, other in zip(found, expected, strict=True)]
    return {**dict(zip(("out", "dq", "dk", "dv"), errors, strict=True)), "tokens": float(layout.length)}


def _layout(shapes: list[Shape], share_prompts: bool) -> RowLayout:
    alone = [bundle for shape in shapes for bundle in shape.bundles(share_prompts)]
    bundles = tuple(Bundle(shape.prompt, tuple(length - 1 for length in shape.responses)) for shape in alone)
    tokens = sum(bundle.tokens for bundle in bundles)
    return RowLayout(bundles=bundles, length=-(-tokens // _MULTIPLE) * _MULTIPLE)


def _inputs(length: int, heads: _Heads) -> list[Tensor]:
    """Queries, keys, values and the gradient that arrives, fp32 [s, heads, d]."""
    generator = torch.Generator(device()).manual_seed(length)
    counts = (heads.queries, heads.groups, heads.groups, heads.queries)
    return [torch.randn(length, count, heads.size, generator=generator, device=device()) for count in counts]


def _attend(name: str, inputs: list[Tensor], layout: RowLayout, window: int | None) -> list[Tensor]:
    """The result and the gradients of queries, keys and values."""
    query, key, value = (each.detach().clone().requires_grad_() for each in inputs[:3])
    out = BACKENDS[name](query, key, value, layout, Scores(query.shape[2] ** -0.5, window))
    torch.autograd.backward(out, inputs[3])
    assert query.grad is not None and key.grad is not None and value.grad is not None
    return [out.detach(), query.grad, key.grad, value.grad]


def _packed_time(name: str, share_prompts: bool, sizes: _Sizes) -> Figures:
    _require(name)
    heads = sizes.heads[0]
    layout = _layout(draw_lengths("ultrachat", sizes.timed_triplets, sizes.timed_length, seed=2), share_prompts)
    *given, slope = (each.to(torch.bfloat16) for each in _inputs(layout.length, heads))
    query, key, value = (each.requires_grad_() for each in given)

    def forward() -> Tensor:
        return BACKENDS[name](query, key, value, layout, Scores(heads.size**-0.5))

    return {**_times(forward, slope, sizes.seconds), "tokens": float(layout.length)}


def _padded_time(sizes: _Sizes) -> Figures:
    """The same responses, each in a row of its own with its prompt, padded to the longest of them all."""
    prepare_platform()
    heads = sizes.heads[0]
    shapes = draw_lengths("ultrachat", sizes.timed_triplets, sizes.timed_length, seed=2)
    rows = [shape.prompt + length - 1 for shape in shapes for length in shape.responses]
    generator = torch.Generator(device()).manual_seed(0)
    counts = (heads.queries, heads.groups, heads.groups, heads.queries)
    *given, slope = (
        torch.randn(len(rows), count, max(rows), heads.size, generator=generator, device=device()).bfloat16()
        for count in counts
    )
    query, key, value = (each.requires_grad_() for each in given)

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return {**_times(forward, slope, sizes.seconds), "tokens": float(len(rows) * max(rows))}


def _times(forward: Callable[[], Tensor], slope: Tensor, seconds: float) -> dict[str, float]:
    both = measure(lambda: torch.autograd.backward(forward(), slope), seconds)
    return {**both.milliseconds(), "forward_ms": 1e3 * measure(forward, seconds).median}
