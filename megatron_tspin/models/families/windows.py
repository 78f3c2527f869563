"""Which layers see a window of the past only, as several families write it."""

from collections.abc import Callable

from megatron_tspin.models.architecture import LayerFacts
from megatron_tspin.models.families.config_reader import ConfigReader

FULL, SLIDING = "full_attention", "sliding_attention"


def read_layers(reader: ConfigReader, window: int | None, is_sliding: Callable[[int], bool]) -> tuple[LayerFacts, ...]:
    """A layer for each entry of `layer_types`.

    Args:
        reader: Of the config.
        window: Keys that a query sees in layers that slide.
        is_sliding: Whether layer i (from 0) does, where the config has no `layer_types`.
    """
    count = reader.whole("num_hidden_layers")
    silent = [SLIDING if window is not None and is_sliding(i) else FULL for i in range(count)]
    kinds = reader.per_layer("layer_types", count, (FULL, SLIDING), silent)
    if window is None and SLIDING in kinds:
        reader.inconsistent(f"layer_types has {SLIDING}, but there is no sliding_window")
    return tuple(LayerFacts(window if kind == SLIDING else None) for kind in kinds)


def read_optional_window(reader: ConfigReader) -> int | None:
    """`sliding_window`, which counts where `use_sliding_window` says so (Qwen, SmolLM3)."""
    used, window = reader.flag("use_sliding_window"), reader.whole("sliding_window", 4096)
    return window if used else None
