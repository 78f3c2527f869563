"""What transformers computes from an HF folder, in float64, with one decoder layer at a time in that precision.

The weights stay as they are stored (safetensors maps the files); a layer is widened while it runs. So the model needs
no memory twice, and a policy of any size has the same judge.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tspin.checkpoint.hf_folder import HFFolder
from megatron_tspin.heartbeat import beat
from megatron_tspin.log import track
from megatron_tspin.objective.rows import Pair
from megatron_tspin.platform import device


@dataclass(frozen=True)
class Reference:
    """Of one prompt and response.

    Attributes:
        log_probs: float64 [response tokens].
        hidden: fp32 [tokens but the last, h], what each decoder layer returns.
    """

    log_probs: Tensor
    hidden: list[Tensor]


def references(folder: Path, pairs: Sequence[Pair], num_layers: int) -> list[Reference]:
    """One a pair, by the model that transformers builds from the folder, a row a pair.

    Its eager attention and its own rope: nothing of ours takes part. transformers itself computes norms and softmaxes
    in fp32, whatever the model's dtype.
    """
    with _threads(), torch.no_grad():
        model = _load(folder)
        layers = _decoder_layers(model, num_layers)
        seen: list[Tensor] = []
        for module in model.modules():
            if not any(module is inner for layer in layers for inner in layer.modules()):
                _widen_own(module)
        for layer in layers:
            layer.register_forward_pre_hook(_widen)
            layer.register_forward_hook(_narrow)
            layer.register_forward_hook(lambda _module, _inputs, output: seen.append(_states(output)))
        return [_one(model, pair, seen) for pair in track(pairs, "transformers", len(pairs), "sequence")]


def _one(model: Any, pair: Pair, seen: list[Tensor]) -> Reference:
    prompt, response = pair
    seen.clear()
    ids = torch.tensor([[*prompt, *response]], device=device())
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    targets = torch.tensor(response, device=device())
    return Reference(log_probs.gather(1, targets[:, None])[:, 0].cpu(), list(seen))


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source = HFFolder(folder)
    stored = max((source.dtype(name) for name in source.names), key=lambda dtype: torch.finfo(dtype).bits)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=stored,
        local_files_only=True,
        trust_remote_code=False,
        attn_implementation="eager",
        experts_implementation="eager",  # grouped products know no float64
    )
    return model.eval()


def _decoder_layers(model: torch.nn.Module, count: int) -> torch.nn.ModuleList:
    return next(
        module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count
    )


def _widen_own(module: torch.nn.Module) -> None:
    """For good, what is outside the layers."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device(), torch.float64)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(device()))


def _widen(layer: Any, _inputs: Any) -> None:
    beat()
    layer.stored = [parameter.data for parameter in layer.parameters()]
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(device(), torch.float64)


def _narrow(layer: Any, _inputs: Any, _output: Any) -> None:
    for parameter, stored in zip(layer.parameters(), layer.stored, strict=True):
        parameter.data = stored
    del layer.stored


def _states(output: Any) -> Tensor:
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states[0].float().cpu()


@contextmanager
def _threads() -> Iterator[None]:
    """All cores for rank 0, which the other ranks wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, len(os.sched_getaffinity(0)) // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)
