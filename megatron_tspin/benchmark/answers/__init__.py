"""How fast prompts are answered: our engine beside others, on the same weights and prompts."""
