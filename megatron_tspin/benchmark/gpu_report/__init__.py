"""Every check and benchmark of a GPU in one command, each in a process of its own."""
