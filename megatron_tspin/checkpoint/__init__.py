"""Policies on disk: HF folders in and out, megatron-core's distributed checkpoints."""
