"""How stages are started and watched."""

from megatron_tspin.config_section import Section, execution


class LaunchSection(Section):
    """The processes of a stage."""

    hang_seconds: float = execution(
        300.0, None, "A rank that stands still for longer within a step, or at a token, ends its stage.", gt=0
    )
    long_hang_seconds: float = execution(
        3600.0, None, "The same between steps, where ranks start, read, write, hash, compare and score.", gt=0
    )
    stop_seconds: float = execution(
        300.0, None, "How long a stage that is asked to stop may take to finish its step or shard and save.", gt=0
    )
