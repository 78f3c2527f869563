"""Tiny random HF checkpoints with a tokenizer, as different from each other as the code under test has cases."""

from pathlib import Path
from typing import Any

VOCABULARY = 101
_SPECIAL = ["<pad>", "<eos>", "<unk>"]
_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}

KINDS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {},
    "llama3_rope": {"rope_parameters": _ROPE},
    "mistral_window": {"class": "Mistral", "sliding_window": 8},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "yarn": {"rope_parameters": _YARN},
    "llama_biases": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "head_dim": 16},
    "smollm3": {"class": "SmolLM3", "no_rope_layers": [1, 0, 1, 1]},
    "smollm3_window": {
        "class": "SmolLM3",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 8,
    },
    "qwen2": {"class": "Qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen2_window": {"class": "Qwen2", "tie_word_embeddings": True, **_WINDOWED},
    "qwen3": {"class": "Qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_window": {"class": "Qwen3", "attention_bias": True, "rope_parameters": _YARN, **_WINDOWED},
    "phi3": {"class": "Phi3", "sliding_window": 8},
    "phi4": {
        "class": "Phi3",
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 96,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.25, 1.5],
            "long_factor": [2.0, 3.0, 4.0],
        },
    },
    "granite": {
        "class": "Granite",
        "tie_word_embeddings": True,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "gemma2": {
        "class": "Gemma2",
        "tie_word_embeddings": True,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 8,
        "final_logit_softcapping": 4.0,
        "attn_logit_softcapping": 3.0,
    },
    "gemma2_plain": {
        "class": "Gemma2",
        "attention_bias": True,
        "sliding_window": 8,
        "layer_types": _ALTERNATING[1:] + ["sliding_attention"],
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    "gemma3": {
        "class": "Gemma3Text",
        "tie_word_embeddings": True,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention"] * 2 + _ALTERNATING[:2],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    },
    "olmo2": {"class": "Olmo2", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "gpt_neox": {"class": "GPTNeoX", "num_key_value_heads": None},
    "gpt_neox_serial": {
        "class": "GPTNeoX",
        "num_key_value_heads": None,
        "tie_word_embeddings": True,
        "use_parallel_residual": False,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5},
    },
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"class": "Mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "qwen3_moe": {
        "class": "Qwen3Moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe_normalised": {
        "class": "Qwen3Moe",
        "tie_word_embeddings": True,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}
DENSE = tuple(KINDS)
KINDS |= MIXTURES
"""Settings by name; `class` is that of transformers without `Config`, Llama where there is none."""


_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}


def config_of(kind: str) -> Any:
    """The config of transformers."""
    import transformers

    settings = {**_COMMON, **KINDS[kind]}
    name = settings.pop("class", "Llama")
    if settings["num_key_value_heads"] is None:  # the class knows no such thing
        del settings["num_key_value_heads"]
    return getattr(transformers, f"{name}Config")(**settings)


def write_checkpoint(folder: Path, kind: str) -> None:
    """Writes 4 layers of width 32 with 4 heads and 2 KV heads, all weights random, norms and biases included."""
    import torch
    import transformers

    config = config_of(kind)
    generator = torch.Generator().manual_seed(list(KINDS).index(kind) + 1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and "gemma" not in config.model_type else 0.0
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> Any:
    """One token per printable character, of 101 in all; adds nothing by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 127)] + ["\n", "\t", "é"]
    tokens = _SPECIAL + characters[: VOCABULARY - len(_SPECIAL)]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
