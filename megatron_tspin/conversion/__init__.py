"""Conversion of HF checkpoints into a run and out of it, and the gate that compares what the two models compute."""
