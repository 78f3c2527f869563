"""Whether the sides compute the same: their sums over the batch, before anything is timed."""

import math
from collections.abc import Sequence

from megatron_tspin.benchmark.results import SideResult
from megatron_tspin.benchmark.settings import BASELINE
from megatron_tspin.errors import ParityError

_TOLERANCE = 1e-4
_BF16_TOLERANCE = 1e-2


def check_agreement(sides: Sequence[SideResult], bf16: bool) -> None:
    """Compares the loss and each role's log-probs, summed over the batch, with plain transformers'.

    Without that side the first one is compared with.

    Args:
        sides: Those that ran once.
        bf16: Wider tolerance.

    Raises:
        ParityError: Two sums differ by more than 1e-4 of the larger (bf16: 1e-2), or are not numbers; names both.
    """
    if not sides:
        return
    judge = next((side for side in sides if side.name == BASELINE), sides[0])
    tolerance = _BF16_TOLERANCE if bf16 else _TOLERANCE
    wrong = [
        f"{name} of the batch: {judge.name} {judge.sums[name]:.9g}, {side.name} {value:.9g}; "
        f"they may differ by {tolerance:g} of it"
        for side in sides
        for name, value in side.sums.items()
        if name in judge.sums and not _agree(judge.sums[name], value, tolerance)
    ]
    if wrong:
        raise ParityError("the sides do not compute the same, nothing was timed\n" + "\n".join(wrong))


def _agree(first: float, second: float, tolerance: float) -> bool:
    return math.isfinite(first) and math.isfinite(second) and math.isclose(first, second, rel_tol=tolerance)
