"""The policy: HF architectures on megatron-core."""
