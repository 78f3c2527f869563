"""All families, by the `model_type` of their config.json. A new one is a file beside this and a line here."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.families.family import Family
from megatron_tspin.models.families.gemma2 import GEMMA2
from megatron_tspin.models.families.gemma3 import GEMMA3
from megatron_tspin.models.families.gpt_neox import GPT_NEOX
from megatron_tspin.models.families.granite import GRANITE
from megatron_tspin.models.families.llama import LLAMA
from megatron_tspin.models.families.mistral import MISTRAL
from megatron_tspin.models.families.mixtral import MIXTRAL
from megatron_tspin.models.families.olmo2 import OLMO2
from megatron_tspin.models.families.phi3 import PHI3
from megatron_tspin.models.families.qwen2 import QWEN2
from megatron_tspin.models.families.qwen3 import QWEN3
from megatron_tspin.models.families.qwen3_moe import QWEN3_MOE
from megatron_tspin.models.families.smollm3 import SMOLLM3
from megatron_tspin.models.families.table import Tensor

_ALL = (
    LLAMA, MISTRAL, SMOLLM3, QWEN2, QWEN3, PHI3, GRANITE, GEMMA2, GEMMA3, OLMO2, GPT_NEOX, MIXTRAL, QWEN3_MOE,
)  # fmt: skip
FAMILIES: Mapping[str, Family] = MappingProxyType({family.model_type: family for family in _ALL})
"""By `model_type`."""


def tensors(architecture: Architecture) -> Iterator[Tensor]:
    """Every tensor of the network, in its order."""
    return FAMILIES[architecture.family].tensors(architecture)
