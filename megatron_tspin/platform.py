"""Where the tensors live: CUDA with NCCL, or megatron-core on the CPU with gloo.

megatron-core 0.16 and 0.19 name CUDA in many places (`device="cuda"`, `.cuda()`, `torch.cuda.current_device()`, type
names such as `torch.cuda.FloatTensor`). `prepare_platform` answers all of those with the CPU when no CUDA device
is there, once per process, before megatron-core is first called; whether it has been imported by then does not matter.
Nothing else in the project knows about the difference.
"""

import functools
import os
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch.utils._device import _device_constructors

from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger

_log = get_logger(__name__)

_FACTORIES = ("tensor", "zeros", "ones", "full", "empty", "arange", "zeros_like", "ones_like", "empty_like")
_prepared = False


def has_cuda() -> bool:
    """Whether this process computes on a CUDA device."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def to_device(values: NDArray[Any]) -> torch.Tensor:
    """The numbers on this rank's device; a GPU at work is not waited for."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device(), non_blocking=True) if has_cuda() else tensor


def backend() -> str:
    """The torch.distributed backend of this platform."""
    return "nccl" if has_cuda() else "gloo"


def prepare_platform(cpu_threads: int = 1) -> None:
    """Makes this process ready for megatron-core; a second call does nothing.

    Args:
        cpu_threads: Threads of torch on a machine without CUDA.
    """
    global _prepared
    if _prepared:
        return
    _prepared = True
    if has_cuda():
        _select_cuda_device()
    else:
        _compile_nothing()
        torch.set_num_threads(cpu_threads)
        _answer_cuda_with_cpu()


def _compile_nothing() -> None:
    """Eager is exact and starts faster: megatron-core decorates its fusions with torch.compile when it is imported.

    Called before that, it also spares the process a second or more for the import of torch's compiler.
    """
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read when dynamo is imported; what was compiled before asks the config
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.disable = True
    _replace(torch, "compile", _as_it_is)


def _as_it_is(model: Any = None, **_: Any) -> Any:
    """`torch.compile` that returns what it is given, also as a decorator with options."""
    return (lambda function: function) if model is None else model


def _select_cuda_device() -> None:
    # megatron-core's overlap needs one queue; CUDA reads this when the device is first touched, below.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise InputError(f"local rank {local_rank} has no GPU of its own: this node has {torch.cuda.device_count()}")
    torch.cuda.set_device(local_rank)


def _answer_cuda_with_cpu() -> None:
    """Replaces the CUDA entry points that megatron-core reaches with their CPU counterparts."""
    # `with torch.device(...)`, which transformers loads models under, knows the factories by identity and lists them
    # at first use; listing them now keeps it working with the replaced ones.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _replace(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor)
    _replace(torch.nn.Module, "cuda", lambda module, *_, **__: module)
    _replace(torch.Tensor, "type", _type_as_if_on_cuda(torch.Tensor.type))
    for module in (torch.cuda, torch.cuda.random):
        _replace(module, "get_rng_state", lambda *_, **__: torch.get_rng_state())
        _replace(module, "set_rng_state", lambda state, *_, **__: torch.set_rng_state(state))
        _replace(module, "manual_seed", lambda seed: torch.manual_seed(seed))
    _replace(torch.cuda, "current_device", lambda: "cpu")
    # A function of its own for each name: torch.compile's tables refuse one object under two names.
    for name in ("set_device", "synchronize", "empty_cache", "current_stream"):
        _replace(torch.cuda, name, lambda *_, **__: None)


def _replace(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that takes `device="cuda"` for the CPU."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _type_as_if_on_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type()` whose answer megatron-core's optimizers compare with CUDA's names."""

    @functools.wraps(original)
    def type_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    return type_name


def seed_everything(seed: int) -> None:
    """Seeds Python and torch. Nothing that the project computes draws from them; libraries might."""
    random.seed(seed)
    torch.manual_seed(seed)


def free_bytes() -> float:
    """Memory that this rank may count on."""
    if has_cuda():
        return float(torch.cuda.mem_get_info()[0])
    with open("/proc/meminfo", encoding="ascii") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
