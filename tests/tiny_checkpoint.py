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

KINDS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {},
    "llama3_rope": {"rope_parameters": _ROPE},
    "mistral_window": {"sliding_window": 8},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


def write_checkpoint(folder: Path, kind: str) -> None:
    """Writes 4 layers of width 32 with 4 heads and 2 KV heads, all weights random, norms included."""
    import torch
    import transformers

    settings = {"tie_word_embeddings": False, **KINDS[kind]}
    family = "Mistral" if "sliding_window" in settings else "Llama"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
        **settings,
    )
    generator = torch.Generator().manual_seed(list(KINDS).index(kind) + 1)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
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
