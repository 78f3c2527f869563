"""A product with a packed weight is that with the weight, and is not had from a weight that has changed since."""

from collections.abc import Callable

import pytest
import torch

from megatron_tspin.models.linears import PackedWeight, can_be_packed

pytestmark = pytest.mark.skipif(not can_be_packed(torch.zeros(1, 1)), reason="torch was built without oneDNN")


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 1), (65,), (300,)])
@pytest.mark.parametrize("with_bias", [True, False])
@torch.no_grad()
def test_product(shape: tuple[int, ...], with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(*shape, 24, generator=generator), torch.randn(40, 24, generator=generator)
    bias = torch.randn(40, generator=generator) if with_bias else None
    found = PackedWeight(weight).product(states, bias)
    assert found is not None and found.is_contiguous()
    assert torch.allclose(found, torch.nn.functional.linear(states, weight, bias), atol=1e-5)
    apart = states.flatten(0, -2).t().contiguous().t().view_as(states)
    assert torch.equal(found, PackedWeight(weight).product(apart, bias)), "however the states lie in memory"


@pytest.mark.parametrize("change", [lambda weight: weight.add_(1), lambda weight: weight[3:].zero_()])
def test_a_weight_that_changed_is_not_used(change: Callable[[torch.Tensor], object]) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 4))
    packed, states = PackedWeight(weight), torch.randn(1, 4)
    assert packed.product(states) is None, "its gradient would be lost"
    with torch.no_grad():
        assert packed.product(states) is not None
        change(weight)
        assert packed.product(states) is None


def test_what_can_be_packed() -> None:
    assert not can_be_packed(torch.zeros(1, 1, dtype=torch.bfloat16))
