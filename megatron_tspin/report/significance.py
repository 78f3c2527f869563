"""Whether two measured accuracies differ by more than chance."""

import math
from dataclasses import dataclass

from megatron_tspin.records import DecodingResult

CLEAR_DIFFERENCE = 2.0  # standard errors


@dataclass(frozen=True)
class Difference:
    """A difference of two means with its standard error."""

    value: float
    standard_error: float

    @property
    def in_errors(self) -> float:
        """Size of the difference in standard errors."""
        return abs(self.value) / self.standard_error

    @property
    def is_clear(self) -> bool:
        """Whether it exceeds two standard errors."""
        return self.in_errors > CLEAR_DIFFERENCE


def compare_decoding(before: DecodingResult | None, after: DecodingResult | None) -> Difference | None:
    """Second minus first, as if from independent prompts.

    The prompts are the same, so that a paired test would find smaller errors: what is clear here is clear there too,
    unless the two policies err on opposite prompts. None without accuracies.
    """
    if before is None or after is None or before.accuracy is None or after.accuracy is None:
        return None
    error = math.hypot(cautious_error(before), cautious_error(after))
    return Difference(after.accuracy - before.accuracy, error)


def cautious_error(result: DecodingResult) -> float:
    """Standard error of an accuracy; never the zero that none or all right would give.

    For those it is the error of Agresti and Coull's estimate: two more right and two more wrong answers.
    """
    accuracy, number = result.accuracy or 0.0, result.num_prompts
    if result.standard_error:
        return result.standard_error
    adjusted = (accuracy * number + 2) / (number + 4)
    return math.sqrt(adjusted * (1 - adjusted) / (number + 4))
