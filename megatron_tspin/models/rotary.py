"""Rotary position embedding from explicit position ids.

Frequencies come from transformers' own rope functions, so that every rope type an HF config can name (default, linear,
llama3, yarn) is computed as the checkpoint's authors meant it; megatron-core hard-codes llama3's constants.
"""

from pathlib import Path

import torch
from torch import Tensor

from megatron_tspin.models.hf_config import rope_settings
from megatron_tspin.storage import read_json


class RotaryFrequencies:
    """Angles of the rotary embedding.

    Attributes:
        attention_factor: What HF multiplies cos and sin with (yarn; 1 otherwise). Queries and keys both carry it, so
            the attention's softmax scale takes its square instead.
    """

    def __init__(self, hf_folder: Path, head_dim: int) -> None:
        frequencies, self.attention_factor = _transformers_frequencies(hf_folder, head_dim)
        self._frequencies = frequencies

    def angles(self, position_ids: Tensor) -> Tensor:
        """Angles [s, b, 1, head_dim] in fp32, both halves alike, for position ids [b, s]."""
        self._frequencies = self._frequencies.to(position_ids.device)
        half = position_ids.t().float().unsqueeze(-1) * self._frequencies
        return torch.cat((half, half), dim=-1).unsqueeze(2)


def _transformers_frequencies(hf_folder: Path, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] in fp32 and the attention factor."""
    settings = rope_settings(read_json(hf_folder / "config.json"))
    if settings["rope_type"] == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / (settings["rope_theta"] ** exponent), 1.0
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.from_pretrained(hf_folder, local_files_only=True, trust_remote_code=False)
    frequencies, factor = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config, device=torch.device("cpu"))
    return frequencies.float(), float(factor)
