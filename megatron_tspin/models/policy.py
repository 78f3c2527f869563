"""The policy: a GPTModel of megatron-core whose last pipeline stage answers with log-probs of responses, no logits."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.autograd import run
from megatron_tspin.models.block_cache import StepLayout
from megatron_tspin.models.head import (
    LogitsRule,
    ResponseTargets,
    VocabularyShard,
    sequence_log_probs,
    shard_logits,
)
from megatron_tspin.models.linears import PackedWeight, can_be_packed, pack_weights, unpack_weights
from megatron_tspin.models.rotary import RotaryFrequencies
from megatron_tspin.models.row_layout import RowLayout


class PolicyModel(GPTModel):
    """A causal language model that returns what T-SPIN needs.

    Built by what `models.provider.make_model_provider` returns. Hidden states are [s, b, h] (s split over TP under
    sequence parallelism).
    """

    def __init__(self, architecture: Architecture, rotary: RotaryFrequencies, **arguments: Any) -> None:
        super().__init__(
            vocab_size=architecture.padded_vocab_size(arguments["config"].tensor_model_parallel_size),
            max_sequence_length=architecture.max_positions,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="none",  # rotary angles come from explicit position ids, below
            **arguments,
        )
        self.architecture = architecture
        self.rotary = rotary
        self._rule = LogitsRule(architecture.logits_scale, architecture.logits_cap)
        self._packed_head: PackedWeight | None = None

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        targets: ResponseTargets | None = None,
        *,
        layout: RowLayout | StepLayout | None = None,
    ) -> Tensor:
        """Runs this pipeline stage of the policy.

        Args:
            tokens: int64 [b, s].
            position_ids: int64 [b, s].
            attention_mask: None for causal rows, or as `CausalAttention` describes.
            targets: The response tokens whose log-probs are wanted.
            layout: Of a packed row (b is 1); under context parallelism s counts the tokens on this rank. That of a step
                of generation asks for the logits after the last token of each sequence instead of log-probs.

        Returns:
            On all but the last pipeline stage the hidden states [s, b, h]; on that one the sequence log-probs fp32
            [num_responses] ([3, num_responses] with diagnostics, see `head.sequence_log_probs`), or this rank's
            logits fp32 [sequences, `vocabulary_shard().valid`].
        """
        embedded = self._embedded(tokens, position_ids) if self.pre_process else None
        hidden: Tensor = self.decoder(
            hidden_states=embedded,
            attention_mask=attention_mask,
            rotary_pos_emb=self.rotary.rotations(position_ids),
            packed_seq_params=layout,
        )
        if not self.post_process:
            return hidden
        if isinstance(layout, StepLayout):
            last = hidden[:, 0].index_select(0, layout.last_tokens)
            return shard_logits(last, self._real_output_weight(), self._rule, self._packed_head)
        if targets is None:
            raise ValueError("the last pipeline stage needs the responses whose log-probs it has to compute")
        log_probs = self._sequence_log_probs(hidden, targets)
        if layout is not None and layout.context.size > 1:
            log_probs = run(_SumOverContext, log_probs, layout.context.group)
        return log_probs

    def _embedded(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        states: Tensor = self.embedding(tokens, position_ids)
        scale = self.architecture.embedding_scale
        if scale == 1.0:
            return states
        # transformers rounds the scale to the embedding's dtype first.
        return states * torch.tensor(scale, dtype=states.dtype, device=states.device)

    def _sequence_log_probs(self, hidden: Tensor, targets: ResponseTargets) -> Tensor:
        # Both make the head's input whole on every rank in forward and sum its gradient over TP in backward, as each
        # rank's vocabulary shard contributes a part.
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        return sequence_log_probs(
            hidden.flatten(0, 1),
            self._output_weight(),
            targets,
            self.vocabulary_shard(),
            weight_is_shared=self.share_embeddings_and_output_weights and self.pre_process,
            rule=self._rule,
        )

    def _output_weight(self) -> Tensor:
        if self.share_embeddings_and_output_weights:
            weight: Tensor = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        return weight

    def _real_output_weight(self) -> Tensor:
        """The head's rows of this rank without those that pad the vocabulary."""
        return self._output_weight()[: self.vocabulary_shard().valid]

    def pack_weights(self) -> None:
        """Makes steps of generation faster where this device can (`linears`); takes as much memory as the weights."""
        pack_weights(self)
        if self.post_process and can_be_packed(head := self._real_output_weight()):
            self._packed_head = PackedWeight(head)

    def unpack_weights(self) -> None:
        """Gives that memory back."""
        unpack_weights(self)
        self._packed_head = None

    def vocabulary_shard(self) -> VocabularyShard:
        """The rows of the vocabulary that this rank's head holds."""
        group = self.pg_collection.tp
        size = self.vocab_size // group.size()
        first = size * group.rank()
        valid = min(max(self.architecture.vocab_size - first, 0), size)
        return VocabularyShard(first=first, size=size, valid=valid, group=group)


class _SumOverContext(torch.autograd.Function):
    """Sums the log-probs of a response whose tokens are spread over CP.

    Every CP rank then computes the same loss of the whole response; each passes the loss's gradient to its own tokens,
    and the parameters' gradients are summed over CP with those of DP. So backward is the identity.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        total = values.double()  # so that the order of the ranks leaves no trace
        dist.all_reduce(total, group=group)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def num_parameters(model: torch.nn.Module) -> int:
    """Number of parameters that this rank holds."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: torch.nn.Module) -> int:
    """Memory of the parameters that this rank holds."""
    return sum(parameter.nbytes for parameter in model.parameters())
