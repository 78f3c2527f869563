"""T-SPIN: triplet-based self-play fine-tuning of language models on megatron-core."""

__version__ = "0.1.0"
