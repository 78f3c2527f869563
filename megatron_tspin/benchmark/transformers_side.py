"""The rival: plain transformers, the way the Alignment Handbook and TRL compute preference losses.

All responses of a micro-batch, role after role, are rows of one batch, padded on the right to the longest of them. The
model returns the logits of every position; log-softmax in fp32, gather and a mask give the log-probs of the responses.
Written here from that description, so that nothing of ours is on this side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from megatron_tspin.benchmark.lengths import TokenTriplet
from megatron_tspin.benchmark.settings import ALPHA, BETA, StepSettings
from megatron_tspin.benchmark.side import LOSS
from megatron_tspin.objective.roles import ROLES
from megatron_tspin.platform import device


@dataclass(frozen=True)
class _MicroBatch:
    """Rows of a micro-batch, [roles * triplets, longest row]: ids, attention mask and response mask."""

    ids: Tensor
    attended: Tensor
    responses: Tensor


def load_model(settings: StepSettings) -> Any:
    """The policy as transformers loads it, on the device, in train mode, with its fused attention."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.bfloat16 if settings.bf16 else torch.float32, attn_implementation="sdpa"
    )
    for parameter in model.parameters():
        # Loaded weights are pages of the file that become resident when they are used; they are no memory of the step.
        parameter.data = parameter.data.clone()
    return model.to(device()).train()


def zero_gradients(model: Any) -> None:
    """Fills the gradients with zeros, in memory that stays."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad.zero_()


class TransformersSide:
    """See the module; implements `side.Side`."""

    def __init__(
        self,
        settings: StepSettings,
        batch: Sequence[TokenTriplet],
        micro_batch_size: int,
        checkpointing: bool = False,
        model: Any = None,
    ) -> None:
        """Takes the model of the settings, or the one given."""
        self._model = load_model(settings) if model is None else model
        if checkpointing:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        self._triplets = len(batch)
        self._micro_batches = [
            _pad(batch[start : start + micro_batch_size]) for start in range(0, len(batch), micro_batch_size)
        ]

    def zero_gradients(self) -> None:
        """See `side.Side`."""
        zero_gradients(self._model)

    def forward_backward(self) -> dict[str, float]:
        """See `side.Side`."""
        total = dict.fromkeys([LOSS, *(f"log_prob_{role}" for role in ROLES)], 0.0)
        for micro_batch in self._micro_batches:
            log_probs = self._log_probs(micro_batch)
            y, synthetic, proto = log_probs
            loss = -F.logsigmoid(ALPHA * (y - synthetic)) - BETA * F.logsigmoid(ALPHA * (synthetic - proto))
            torch.autograd.backward(loss.sum() / self._triplets)
            total[LOSS] += loss.sum().item()
            for role, value in zip(ROLES, log_probs.detach(), strict=True):
                total[f"log_prob_{role}"] += value.sum().item()
        return total

    def _log_probs(self, batch: _MicroBatch) -> Tensor:
        """Sequence log-probs fp32 [roles, triplets]."""
        logits = self._model(input_ids=batch.ids, attention_mask=batch.attended, use_cache=False).logits
        predicted = logits[:, :-1].float().log_softmax(dim=-1)
        by_token = predicted.gather(2, batch.ids[:, 1:, None])[..., 0]
        by_row: Tensor = (by_token * batch.responses[:, 1:]).sum(dim=1)
        return by_row.view(len(ROLES), -1)

    def versions(self) -> dict[str, str]:
        """See `side.Side`."""
        return {"torch": torch.__version__, "transformers": transformers.__version__}


def _pad(batch: Sequence[TokenTriplet]) -> _MicroBatch:
    """One row a response, the annotated ones of all triplets first."""
    rows = [(triplet.prompt, triplet.responses[role]) for role in range(len(ROLES)) for triplet in batch]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids, attended, responses = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(3))
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        attended[row, :end] = 1
        responses[row, len(prompt) : end] = 1
    return _MicroBatch(ids.to(device()), attended.to(device()), responses.to(device()))
