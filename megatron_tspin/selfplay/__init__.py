"""The driver: a state machine over a run directory whose stages are separate processes. It imports no torch."""
