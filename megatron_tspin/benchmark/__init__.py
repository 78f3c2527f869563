"""Measurements of a training step, beside the tools that people use today."""
