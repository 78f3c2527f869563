"""Products of few tokens are those of many, and lie in memory as kernels expect them."""

import pytest
import torch

from megatron_tspin.models.linears import _of_few_tokens, few_tokens_product


@pytest.mark.parametrize("tokens", [1, 2, 65])
def test_product_of_few_tokens(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(tokens, 24, generator=generator), torch.randn(40, 24, generator=generator)
    found = few_tokens_product(states, weight)
    assert found.is_contiguous(), "torch's flash kernel on a CPU takes the last dimension to be dense without a look"
    assert torch.allclose(found, states @ weight.t(), atol=1e-5)


def test_an_expert_without_tokens() -> None:
    with torch.no_grad():
        found = _of_few_tokens(torch.zeros(0, 24), torch.zeros(40, 24), torch.zeros(40))
    assert found is not None and found.shape == (0, 40)
