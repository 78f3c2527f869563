"""Rotary position embedding from explicit position ids.

Frequencies come from transformers' own rope functions, so that every rope type an HF config can name (default, linear,
llama3, yarn, longrope) is computed as the checkpoint's authors meant it; megatron-core hard-codes llama3's constants.
"""

from pathlib import Path

import torch
from torch import Tensor

from megatron_tspin.models.architecture import Architecture, Rope


class RotaryFrequencies:
    """Angles of a network's ropes.

    Attributes:
        attention_factors: What each rope's cosines and sines are multiplied with (yarn, longrope; 1 otherwise).
    """

    def __init__(self, architecture: Architecture) -> None:
        found = [_frequencies(rope, architecture.head_dim, architecture.folder) for rope in architecture.ropes]
        self.attention_factors = [factor for _, factor in found]
        self._frequencies = torch.stack([frequencies for frequencies, _ in found])
        self._factors = torch.tensor(self.attention_factors)

    def rotations(self, position_ids: Tensor) -> Tensor:
        """Cosines and sines [2, ropes, s, b, 1, columns / 2] in fp32, factors included, for position ids [b, s]."""
        self._frequencies, self._factors = (each.to(position_ids.device) for each in (self._frequencies, self._factors))
        angles = (position_ids.t().float()[..., None] * self._frequencies[:, None, None, :]).unsqueeze(3)
        return torch.stack((angles.cos(), angles.sin())) * self._factors[:, None, None, None, None]


def rotate(states: Tensor, rotation: Tensor) -> Tensor:
    """Rotates the first columns of each head, as transformers' `apply_rotary_pos_emb` does: column i with i + half.

    Args:
        states: Queries or keys [s, b, heads, d].
        rotation: Cosines and sines of one rope, [2, s, b, 1, columns / 2].
    """
    cos, sin = rotation.to(states.dtype)
    half = cos.shape[-1]
    first, second, rest = states[..., :half], states[..., half : 2 * half], states[..., 2 * half :]
    parts = [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)]
    return torch.cat(parts + [rest] * bool(rest.shape[-1]), dim=-1)


def _frequencies(rope: Rope, head_dim: int, hf_folder: Path) -> tuple[Tensor, float]:
    """Inverse frequencies [columns / 2] in fp32 and the attention factor."""
    if rope.settings["rope_type"] == "default":
        exponent = torch.arange(0, rope.columns, 2, dtype=torch.int64).float() / rope.columns
        return 1.0 / (rope.settings["rope_theta"] ** exponent), 1.0
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.from_pretrained(hf_folder, local_files_only=True, trust_remote_code=False)
    if getattr(config, "head_dim", 0) is None:  # those functions multiply it
        config.head_dim = head_dim
    compute = ROPE_INIT_FUNCTIONS[rope.settings["rope_type"]]
    frequencies, factor = compute(config, device=torch.device("cpu"), layer_type=rope.layer_type)
    return frequencies.float(), float(factor)
