"""How long a self-play iteration takes, beside the same one in plain transformers."""
