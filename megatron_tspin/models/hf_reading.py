"""Whether a config.json was understood as transformers understands it: a checkpoint's authors ran it there."""

from typing import Any

from megatron_tspin.errors import InputError
from megatron_tspin.models.hf_config import Architecture, rope_settings
from megatron_tspin.storage import read_json


def check_reading(architecture: Architecture) -> None:
    """Demands that transformers reads the same facts from the architecture's config.json.

    Two keys that state one fact in two ways, values of odd types and defaults of versions all show here.

    Raises:
        InputError: transformers refuses the file, or reads another value; names each fact with both values.
    """
    from transformers import AutoConfig

    path = architecture.folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(architecture.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the loaders raise whatever their validators raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: transformers refuses it: {type(error).__name__}: {reason}") from error
    ours = {**vars(architecture), "rope": _rope(rope_settings(read_json(path)))}
    differing = [
        f"{path}: {name} is {ours[name]!r} as read here, {value!r} for transformers; let the file say it once"
        for name, value in _facts(config).items()
        if ours[name] != value
    ]
    if differing:
        raise InputError("\n".join(differing))


def _facts(config: Any) -> dict[str, Any]:
    """What transformers read, under the names of `Architecture`."""
    return {
        "family": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim or config.hidden_size // config.num_attention_heads,
        "norm_eps": config.rms_norm_eps,
        "tied_embeddings": config.tie_word_embeddings,
        "max_positions": config.max_position_embeddings,
        "sliding_window": getattr(config, "sliding_window", None),
        "rope": _rope(config.rope_parameters),
    }


def _rope(settings: dict[str, Any]) -> dict[str, Any]:
    """Without the old name of `rope_type`, and without what says nothing."""
    found = {key: value for key, value in settings.items() if key != "type" and value is not None}
    return {key: value for key, value in found.items() if (key, value) != ("partial_rotary_factor", 1.0)}
