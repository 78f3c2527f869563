"""What an FP8 linear keeps, when it quantises anew, and what it refuses."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_tspin.config import ParallelSection
from megatron_tspin.errors import InputError
from megatron_tspin.precision import TorchFp8
from tests.models.fp8_layers import (
    BOTH,
    E4M3,
    E5M2,
    HYBRID,
    INPUTS,
    KINDS,
    OUTPUTS,
    compute,
    judge,
    kept_for_backward,
    make_layer,
    matrices,
    recorded_products,
    step,
)
from tests.rank_pool import in_layout


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


def biases(kind: str) -> None:
    states, weight = matrices()[:2]
    with in_layout(ParallelSection()):
        plain, _ = make_layer(kind, HYBRID, weight)(states)
        for skipped in (False, True):
            layer = make_layer(kind, HYBRID, weight, bias=True, skip_bias_add=skipped)
            layer.bias.data.copy_(torch.arange(float(len(layer.bias))))
            output, bias = layer(states)
            assert (bias is layer.bias) == skipped
            torch.testing.assert_close(output, plain if skipped else plain + layer.bias)
            output.sum().backward()
            assert skipped or layer.bias.grad.eq(states[..., 0].numel()).all()


@KINDS
def test_a_bias_is_added_or_handed_on(kind: str, ranks: Any) -> None:
    ranks(1).run(biases, kind)


@KINDS
def test_checkpoints_hold_the_weight_alone(kind: str) -> None:
    layer = make_layer(kind, HYBRID, matrices()[1])
    compute(layer, matrices()[0])
    assert {name for name, value in layer.state_dict().items() if value is not None} == {"weight"}
