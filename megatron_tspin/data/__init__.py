"""Examples, prompts and token files."""
