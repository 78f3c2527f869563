"""Reads an HF `config.json` into an `Architecture`, and refuses by name whatever is not implemented.

No torch here: the driver checks a checkpoint before any stage starts.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tspin.config import ParallelSection
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.errors import InputError
from megatron_tspin.storage import read_json

FAMILIES = ("llama", "mistral")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_VOCABULARY_MULTIPLE = 128

# Keys that this module reads; the next set does not change what the network computes.
_READ = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "hidden_act", "attention_bias", "mlp_bias",
    "partial_rotary_factor", "eos_token_id", "layer_types",
}  # fmt: skip
_NOT_UNDERSTOOD = "is not understood, so the computation might differ; remove the key if it is unused"
_ADVICE = {
    "auto_map": "names code of the checkpoint's own, which is never run here; remove the key if the model computes "
    "what its model_type says, as transformers' own class does",
    "quantization_config": "says that the weights are quantised; take the unquantised checkpoint, or dequantise it "
    "with transformers (`model.dequantize()`) and save it again",
}
_FRACTION = "rms_norm_eps"
_JSON_NAMES = {list: "a list", dict: "an object"}
_NEUTRAL = {
    "architectures", "transformers_version", "torch_dtype", "dtype", "bos_token_id", "pad_token_id", "use_cache",
    "initializer_range", "_name_or_path", "name_or_path", "attention_dropout", "pretraining_tp", "is_llama_config",
    "transformers.js_config", "unk_token_id", "max_length", "id2label", "label2id", "problem_type", "return_dict",
    "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "keys_to_ignore_at_inference",
    "_attn_implementation", "tokenizer_class",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """What the network computes, in the field's terms. Sizes count units, not bytes."""

    family: str
    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    tied_embeddings: bool
    max_positions: int
    sliding_window: int | None
    folder: Path
    """Where the HF checkpoint lies; rope frequencies are computed from its config by transformers' functions."""

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """Vocabulary rows of the embedding and the head, so that each TP rank holds the same number.

        A multiple of 128 that does not depend on TP as long as TP is a power of two up to 128.
        """
        multiple = math.lcm(_VOCABULARY_MULTIPLE, tensor_parallel_size)
        return math.ceil(self.vocab_size / multiple) * multiple

    def check_length(self, seq_length: int) -> None:
        """Refuses rows longer than the positions that the policy was made for.

        Raises:
            InputError: `seq_length` is larger than `max_position_embeddings`.
        """
        if seq_length > self.max_positions:
            raise InputError(
                f"data.seq_length = {seq_length} is more than the {self.max_positions} positions "
                f"(max_position_embeddings) of {self.folder}; lower --seq-length"
            )

    def check_layout(self, parallel: ParallelSection) -> None:
        """Refuses a layout that does not fit the network.

        Raises:
            InputError: TP does not divide the heads, the KV heads or the MLP, or PP the layers; all in one message.
        """
        tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        pieces = pipeline * parallel.num_virtual_stages
        virtual = " x virtual_pipeline_model_parallel_size" if parallel.num_virtual_stages > 1 else ""
        divisors = [
            ("tensor_model_parallel_size", tensor, "attention heads", self.num_heads),
            ("tensor_model_parallel_size", tensor, "key-value heads", self.num_kv_heads),
            ("tensor_model_parallel_size", tensor, "MLP columns", self.ffn_hidden_size),
            (f"pipeline_model_parallel_size{virtual}", pieces, "layers", self.num_layers),
        ]
        refused = [
            f"parallel.{name} = {size} does not divide the {count} {what} of {self.folder}; use a divisor of {count}"
            for name, size, what, count in divisors
            if count % size
        ]
        if refused:
            raise InputError("\n".join(refused))

    def check_precision(self, parallel: ParallelSection, precision: PrecisionSection) -> None:
        """Refuses FP8 on sizes that its kernels do not take.

        Raises:
            InputError: A linear layer's size on one TP rank is not a multiple of what FP8 needs, or all layers are to
                stay out of FP8; all in one message.
        """
        if precision.fp8 is None:
            return
        tensor, unit = parallel.tensor_model_parallel_size, precision.features_multiple
        heads = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        sizes = {
            "hidden_size": self.hidden_size,
            "rows of queries, keys and values on a TP rank": heads // tensor,
            "columns of the attention's output on a TP rank": self.num_heads * self.head_dim // tensor,
            "columns of the MLP on a TP rank": self.ffn_hidden_size // tensor,
        }
        refused = [
            f"precision.fp8 = {precision.fp8} needs sizes that are multiples of {unit}: {what} of {self.folder} is "
            f"{size} at tensor_model_parallel_size = {tensor}; leave --fp8-format out"
            f"{', or lower tensor_model_parallel_size' if tensor > 1 else ''}"
            for what, size in sizes.items()
            if size % unit
        ]
        if precision.num_bf16_layers >= self.num_layers:
            refused.append(
                f"num_layers_at_start_in_bf16 + num_layers_at_end_in_bf16 = {precision.num_bf16_layers} leave none of "
                f"the {self.num_layers} layers of {self.folder} in FP8; lower them, or leave --fp8-format out"
            )
        if refused:
            raise InputError("\n".join(refused))


def read_architecture(folder: Path) -> Architecture:
    """Reads `config.json` of an HF checkpoint.

    Raises:
        InputError: The folder or the file is missing, a value is absent, or something is not implemented. All problems
            are in one message, each naming the file, the key and the value.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; model.hf_checkpoint must be a folder with config.json")
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(config).__name__}")
    problems = _problems(config)
    if problems:
        raise InputError("\n".join(f"{path}: {problem}" for problem in problems))
    heads = int(config["num_attention_heads"])
    return Architecture(
        family=config["model_type"],
        vocab_size=int(config["vocab_size"]),
        hidden_size=int(config["hidden_size"]),
        ffn_hidden_size=int(config["intermediate_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=_num_kv_heads(config),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        norm_eps=float(config["rms_norm_eps"]),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_positions=int(config["max_position_embeddings"]),
        sliding_window=_sliding_window(config),
        folder=folder,
    )


def _problems(config: dict[str, Any]) -> list[str]:
    """Everything in the config that stands in the way."""
    family = config.get("model_type")
    if family not in FAMILIES:
        return [f"model_type = {family!r} is not implemented; implemented are {', '.join(FAMILIES)}"]
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "rms_norm_eps", "max_position_embeddings")  # fmt: skip
    found = [f"`{key}` is missing" for key in required if key not in config]
    found += [
        f"`{key}` = {config[key]!r} must be a {'number' if key == _FRACTION else 'whole number'} above 0"
        for key in required
        if key in config and not _is_positive(config[key], whole=key != _FRACTION)
    ]
    found += [
        f"`{key}` = {value!r} {_ADVICE.get(key, _NOT_UNDERSTOOD)}"
        for key, value in config.items()
        if key not in _READ | _NEUTRAL and value not in (None, False, [], {})
    ]
    kinds = {"layer_types": list, "rope_scaling": dict, "rope_parameters": dict}
    ill = [key for key, kind in kinds.items() if not isinstance(config.get(key), kind | None)]
    if ill:
        return [*found, *(f"`{key}` = {config[key]!r} must be {_JSON_NAMES[kinds[key]]}" for key in ill)]
    whole = ("num_key_value_heads", "head_dim", "sliding_window")
    found += [
        f"`{key}` = {config[key]!r} must be a whole number above 0"
        for key in whole
        if config.get(key) is not None and not _is_positive(config[key], whole=True)
    ]
    if not found:
        found += _head_problems(config)
    if config.get("hidden_act", "silu") != "silu":
        found.append(f"hidden_act = {config['hidden_act']!r} is not implemented; only silu is")
    found += [
        f"{key} = {config[key]!r} is not implemented" for key in ("attention_bias", "mlp_bias") if config.get(key)
    ]
    expected = "sliding_attention" if family == "mistral" and _sliding_window(config) else "full_attention"
    others = set(config.get("layer_types") or []) - {expected}
    if others:
        found.append(f"layer_types has {', '.join(sorted(others))}; only {expected} in every layer is implemented")
    rope = rope_settings(config)
    if rope["rope_type"] not in _ROPE_TYPES:
        found.append(f"rope type {rope['rope_type']!r} is not implemented; implemented are {', '.join(_ROPE_TYPES)}")
    if not _is_positive(rope["rope_theta"], whole=False):
        found.append(f"rope_theta = {rope['rope_theta']!r} must be a number above 0")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    if partial != 1.0:
        found.append(f"partial_rotary_factor = {partial} is not implemented")
    return found


def _is_positive(value: Any, whole: bool) -> bool:
    return (type(value) is int or (type(value) is float and not whole)) and value > 0


def _head_problems(config: dict[str, Any]) -> list[str]:
    """Sizes of heads that do not add up."""
    heads, hidden, kv_heads = config["num_attention_heads"], config["hidden_size"], _num_kv_heads(config)
    found = []
    if not config.get("head_dim") and hidden % heads:
        found.append(f"num_attention_heads = {heads} does not divide hidden_size = {hidden}, and there is no head_dim")
    if heads % kv_heads:
        found.append(f"num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}")
    if (config.get("head_dim") or hidden // heads) % 2:
        found.append(
            f"heads of {config.get('head_dim') or hidden // heads} columns have no rotary halves; needs even ones"
        )
    return found


def _sliding_window(config: dict[str, Any]) -> int | None:
    """Keys that a query sees, itself included; HF's Mistral has 4096 where the config is silent."""
    window: int | None = config.get("sliding_window", 4096) if config["model_type"] == "mistral" else None
    return window


def _num_kv_heads(config: dict[str, Any]) -> int:
    """The number of heads where the config has none; HF's Mistral has 8 where the config is silent."""
    silent = 8 if config["model_type"] == "mistral" else None
    return int(config.get("num_key_value_heads", silent) or config["num_attention_heads"])


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The rope settings under transformers 5's names (`rope_parameters`), whichever version wrote the config."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    settings["rope_type"] = settings.get("rope_type") or settings.get("type") or "default"
    settings.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return settings
