"""A check that cannot be imported."""

raise ImportError("no such library")
