"""Whether the nodes of a job can do what a run wants of them, found in seconds before its first stage."""
