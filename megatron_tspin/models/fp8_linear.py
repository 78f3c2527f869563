"""megatron-core's column- and row-parallel linears, computed in FP8 by torch alone.

With x [t, k], w [n, k] and g, the gradient of the output [t, n], there are three products, each of two FP8 matrices:

    output           x @ w.t()     sums over k
    input gradient   g @ w         sums over n
    weight gradient  g.t() @ x     sums over t, into megatron-core's fp32 gradient buffer

A scale covers a whole matrix or, row-wise, the terms of one sum; each matrix is then quantised once for each of its two
products. Where TP splits what a scale covers, the maximum is taken over TP, so that every layout quantises alike:

    column-parallel  w and g are split along n; x along t under sequence parallelism, until it is gathered
    row-parallel     x and w are split along k; g along t under sequence parallelism, until it is gathered
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.utils import get_pg_size
from torch import Tensor

from megatron_tspin.errors import InputError
from megatron_tspin.models.autograd import already_added, run
from megatron_tspin.models.fp8_quantize import (
    ALIGNMENT,
    Quantized,
    absolute_maximum,
    matmul_transposed,
    quantize,
    transposed,
)
from megatron_tspin.precision import TorchFp8


@dataclass(frozen=True)
class _Plan:
    """How a linear quantises, and along which dimension TP splits its matrices; None where each rank has it all."""

    settings: TorchFp8
    group: dist.ProcessGroup
    input_split: int | None
    weight_split: int | None
    gradient_split: int | None
    sums_input_gradient: bool
    """Each rank computes a share of the whole input's gradient."""

    def quantize(self, matrix: Tensor, dtype: torch.dtype, summed: int, split: int | None) -> Quantized:
        """This rank's part of the matrix, for a product that sums over the dimension `summed`."""
        along = summed if self.settings.rowwise else None
        covers_split = split is not None and along in (None, split)
        amax = absolute_maximum(matrix, along, self.group if covers_split else None)
        return quantize(matrix, amax, dtype, self.settings.margin)

    def quantize_again(self, first: Quantized, matrix: Tensor, split: int | None) -> Quantized:
        """The same for the product that sums over the matrix's rows, given `first` for the other one."""
        return self.quantize(matrix, first.values.dtype, 0, split) if self.settings.rowwise else first

    def gather(self, part: Quantized, summed: int, split: int | None) -> Quantized:
        """The whole of what is split along its rows, the tokens; the rest as it is."""
        if split != 0:
            return part
        scale = part.inverse_scale
        if self.settings.rowwise and summed == 1:
            scale, _ = _gather(scale, self.group)
        return Quantized(_gather(part.values, self.group)[0], scale)


class _Fp8Linear(torch.autograd.Function):
    """The three products. Kept for backward is the input in FP8; under sequence parallelism this rank's part of it."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, operands: "_WeightOperands", plan: _Plan, keep_input: bool
    ) -> Tensor:
        tokens = states.reshape(-1, states.shape[-1])
        part = plan.quantize(tokens, plan.settings.forward, 1, plan.input_split)
        whole = plan.gather(part, 1, plan.input_split)
        # What the faster sum loses is little beside the rounding of its terms to FP8.
        output = matmul_transposed(whole, operands.forward, states.dtype, fast=True)
        if plan.gradient_split == 0:
            output, _ = _scatter_sum(output, plan.group)
        ctx.plan, ctx.weight_operand, ctx.shape, ctx.dtype = plan, operands.backward, states.shape, states.dtype
        if keep_input:
            kept = plan.quantize_again(part, tokens, plan.input_split)
            ctx.save_for_backward(weight, kept.values, kept.inverse_scale)
        return output.reshape(-1, *states.shape[1:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        plan: _Plan = ctx.plan
        local = gradients[0].reshape(-1, gradients[0].shape[-1])
        arriving = _start_gathering_input(ctx) if ctx.needs_input_grad[1] else None
        part = plan.quantize(local, plan.settings.backward, 1, plan.gradient_split)
        gradient = plan.gather(part, 1, plan.gradient_split)
        # No fast sums: in gradients small terms count that large ones of both signs leave over, and they add up over
        # layers and steps.
        share = matmul_transposed(gradient, ctx.weight_operand, ctx.dtype, fast=False)
        input_gradient, reduction = _start_reduction(share, plan)
        weight_gradient = None
        if arriving is not None:
            if plan.settings.rowwise:
                part = plan.quantize_again(part, local, plan.gradient_split)
                gradient = plan.gather(part, 0, plan.gradient_split)
            weight_gradient = _weight_gradient(ctx.saved_tensors[0], gradient, arriving)
        if reduction is not None:
            reduction.wait()
        return input_gradient.reshape(ctx.shape), weight_gradient, None, None, None


@dataclass(frozen=True)
class _Arriving:
    """A matrix that other ranks are still sending parts of."""

    matrix: Quantized
    work: dist.Work | None


def _start_gathering_input(ctx: Any) -> _Arriving:
    """The input as it was kept, with the other ranks' tokens. Arrives beside the input gradient's product."""
    _, values, inverse_scale = ctx.saved_tensors
    work = None
    if ctx.plan.input_split == 0:
        values, work = _gather(values, ctx.plan.group, asynchronous=True)
    return _Arriving(Quantized(values, inverse_scale), work)


def _start_reduction(share: Tensor, plan: _Plan) -> tuple[Tensor, dist.Work | None]:
    """The sum of the ranks' shares of the input gradient. Done beside the weight gradient's product."""
    if plan.input_split == 0:
        return _scatter_sum(share, plan.group, asynchronous=True)
    if plan.sums_input_gradient:
        return share, dist.all_reduce(share, group=plan.group, async_op=True)
    return share, None


def _weight_gradient(weight: Tensor, gradient: Quantized, arriving: _Arriving) -> Tensor:
    """Adds to the weight's `main_grad` where it has one, and returns what autograd is to be told."""
    left = transposed(gradient)
    if arriving.work is not None:
        arriving.work.wait()
    product = matmul_transposed(left, transposed(arriving.matrix), torch.float32, fast=False)
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None:
        return product.to(weight.dtype)
    main_grad.add_(product)
    return already_added(weight)


def _gather(part: Tensor, group: dist.ProcessGroup, asynchronous: bool = False) -> tuple[Tensor, dist.Work | None]:
    """[t * TP, ...] from every rank's [t, ...], sent as bytes, because not every backend knows FP8."""
    whole = part.new_empty((part.shape[0] * group.size(), *part.shape[1:]))
    sent, received = part.contiguous().view(torch.uint8), whole.view(torch.uint8)
    return whole, dist.all_gather_into_tensor(received, sent, group=group, async_op=asynchronous)


def _scatter_sum(
    share: Tensor, group: dist.ProcessGroup, asynchronous: bool = False
) -> tuple[Tensor, dist.Work | None]:
    """This rank's [t, ...] of the sum of every rank's [t * TP, ...]."""
    part = share.new_empty((share.shape[0] // group.size(), *share.shape[1:]))
    return part, dist.reduce_scatter_tensor(part, share, group=group, async_op=asynchronous)


@dataclass(frozen=True)
class _WeightOperands:
    """A weight in FP8, as its two products need it."""

    forward: Quantized
    """[n, k]."""
    backward: Quantized | None
    """[k, n]; None as long as nothing has asked for a gradient."""


class _Fp8Weight(torch.nn.Module):
    """What both linears share: the plan, and the weight in FP8 until it changes.

    Attributes:
        is_first_microbatch: The weight may have changed since it was quantised. No counter of torch's would tell:
            optimizers and checkpoints write through `.data`.
    """

    # Set by megatron-core's classes, which are untyped.
    tp_group: dist.ProcessGroup
    weight: torch.nn.Parameter
    sequence_parallel: bool
    input_size: int
    output_size: int

    is_first_microbatch: bool
    _plan: _Plan
    _operands: _WeightOperands | None

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        """Takes what megatron-core's linear takes.

        Raises:
            InputError: There is a bias, or this rank's inputs or outputs are no multiple of 16.
        """
        super().__init__(input_size, output_size, config=config, **options)
        self._plan, inputs, outputs = self._plan_of(config.torch_fp8)
        self._operands, self.is_first_microbatch = None, True
        self._check(_name(options), inputs, outputs)

    def _plan_of(self, settings: TorchFp8) -> tuple[_Plan, int, int]:
        """The plan, and this rank's inputs and outputs."""
        raise NotImplementedError

    def _check(self, name: str, inputs: int, outputs: int) -> None:
        tp = get_pg_size(self._plan.group)
        for what, size in (("inputs", inputs), ("outputs", outputs)):
            if size % ALIGNMENT:
                raise InputError(
                    f"linear {name}: {size} {what} a rank at TP {tp}, and FP8 needs a multiple of {ALIGNMENT}; use a "
                    f"TP that leaves one, or train without FP8"
                )

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        """megatron-core's hook for the product: [s, b, k] to [s, b, n], with s as the layout splits it.

        A bias is added in the format of the output.
        """
        backward_follows = torch.is_grad_enabled()
        operands = self._current_operands(weight.detach(), backward_follows)
        keep_input = backward_follows and weight.requires_grad
        output: Tensor = run(_Fp8Linear, input, weight, operands, self._plan, keep_input)
        return output if bias is None else output + bias

    def _current_operands(self, weight: Tensor, backward_follows: bool) -> _WeightOperands:
        split = self._plan.weight_split
        if self.is_first_microbatch or self._operands is None:
            forward = self._plan.quantize(weight, self._plan.settings.forward, 1, split)
            self._operands, self.is_first_microbatch = _WeightOperands(forward, None), False
        if backward_follows and self._operands.backward is None:
            forward = self._operands.forward
            backward = transposed(self._plan.quantize_again(forward, weight, split))
            self._operands = _WeightOperands(forward, backward)
        return self._operands


class Fp8ColumnParallelLinear(_Fp8Weight, ColumnParallelLinear):
    """ColumnParallelLinear in FP8, by the settings in `config.torch_fp8`."""

    allreduce_dgrad: bool
    output_size_per_partition: int

    def _plan_of(self, settings: TorchFp8) -> tuple[_Plan, int, int]:
        split = get_pg_size(self.tp_group) > 1
        plan = _Plan(
            settings=settings,
            group=self.tp_group,
            input_split=0 if self.sequence_parallel else None,
            weight_split=0 if split else None,
            gradient_split=1 if split else None,
            sums_input_gradient=self.allreduce_dgrad,
        )
        return plan, self.input_size, self.output_size_per_partition


class Fp8RowParallelLinear(_Fp8Weight, RowParallelLinear):
    """RowParallelLinear in FP8, by the settings in `config.torch_fp8`."""

    input_size_per_partition: int
    skip_bias_add: bool
    bias: torch.nn.Parameter | None

    def _plan_of(self, settings: TorchFp8) -> tuple[_Plan, int, int]:
        split = get_pg_size(self.tp_group) > 1
        plan = _Plan(
            settings=settings,
            group=self.tp_group,
            input_split=1 if split else None,
            weight_split=1 if split else None,
            gradient_split=0 if split and self.sequence_parallel else None,
            sums_input_gradient=False,
        )
        return plan, self.input_size_per_partition, self.output_size

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, k of this rank] to [s, b, n], of this rank's part of s under sequence parallelism; and the bias."""
        if self._plan.gradient_split == 0:
            # The sum over TP is part of our step, so that its gradient travels in FP8.
            output = self._forward_impl(input_, self.weight)
            if self.bias is None or self.skip_bias_add:
                return output, self.bias
            return output + self.bias, None
        output, bias = super().forward(input_)
        return output, bias


def _name(options: dict[str, Any]) -> str:
    """What megatron-core calls the linear: qkv, proj, fc1 or fc2; since 0.19 it may have a longer name."""
    return str(options.get("name") or options.get("tp_comm_buffer_name") or "without a name")


def weights_changed(model: torch.nn.Module) -> None:
    """Makes every FP8 linear quantise its weight anew at its next forward pass.

    To be called after each optimizer step and each loading of weights: megatron-core's schedules raise the same flag
    (`set_is_first_microbatch`), but only where its own `config.fp8` is set, which needs Transformer Engine.
    """
    for module in model.modules():
        if isinstance(module, _Fp8Weight):
            module.is_first_microbatch = True
