"""What a run shows: figures, tables and warnings, read from its folder."""
