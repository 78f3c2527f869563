"""One platform: CUDA's names answered by the CPU, and nothing compiled behind our back."""

import os
from typing import Any

import pytest
import torch

from megatron_tspin import platform
from megatron_tspin.errors import InputError


def cuda_names() -> dict[str, Any]:
    """What megatron-core asks CUDA for, on a rank without one."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("compiled")

    compiled = torch.compile(lambda x: x + 1, backend=refuse)
    tensor = torch.zeros(2, device="cuda", pin_memory=True)
    return {
        "factory": tensor.device.type,
        "method": torch.nn.Linear(1, 1).cuda().weight.cuda().device.type,
        "type": tensor.type(),
        "cast": tensor.type(torch.float64).dtype == torch.float64,
        "current": torch.ones(1, device=torch.cuda.current_device()).device.type,
        "stream": torch.cuda.current_stream(),
        "compiled": compiled(tensor).tolist(),
        "device": str(platform.device()),
        "backend": platform.backend(),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_cpu_answers_for_cuda(ranks: Any) -> None:
    assert ranks(1).run(cuda_names)[0] == {
        "factory": "cpu",
        "method": "cpu",
        "type": "torch.cuda.FloatTensor",
        "cast": True,
        "current": "cpu",
        "stream": None,
        "compiled": [1.0, 1.0],
        "device": "cpu",
        "backend": "gloo",
    }


def test_cuda_is_told_about_queues_before_it_is_touched(monkeypatch: Any) -> None:
    seen = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda rank: seen.append((rank, os.environ.get(NAME))))
    platform._select_cuda_device()
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="local rank 2 has no GPU of its own: this node has 2"):
        platform._select_cuda_device()
    assert seen == [(1, "1")]
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")


NAME = "CUDA_DEVICE_MAX_CONNECTIONS"
