"""Families of models, a file each: what stands in a config.json, and which tensors a checkpoint has. No torch here."""
