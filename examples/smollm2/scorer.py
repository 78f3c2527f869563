"""Score a response to a maths question by its final number."""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

MARKER = "####"
NUMBER = re.compile(
    r"""
    (?P<sign>(?<![\w)])-)?                                   # a minus, but not the one of 5-3
    [$€£]?
    (?P<sign_inside>-)?                                      # $-5
    (?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])  # 1,234.50
      |[0-9]+(?:\.[0-9]+)?                                   # 1234 or 1234.5, never the dot that ends a sentence
      |\.[0-9]+)                                             # .5
    """,
    re.VERBOSE,
)


def to_decimal(match: re.Match[str]) -> Decimal:
    """Turn a match of `NUMBER` into its value."""
    value = Decimal(match["digits"].replace(",", ""))
    return -value if match["sign"] or match["sign_inside"] else value


def final_number(text: str) -> Decimal | None:
    """Find the number that a response gives as its answer.

    Args:
        text: The response, with or without a `####` line.

    Returns:
        The first number after the last `####`; if there is none, the last number of the text; None if it has no number.
    """
    _, marker, tail = text.rpartition(MARKER)
    marked = NUMBER.search(tail.partition("\n")[0]) if marker else None
    if marked is not None:
        return to_decimal(marked)
    numbers = list(NUMBER.finditer(text))
    return to_decimal(numbers[-1]) if numbers else None


def score(record: Mapping[str, Any], response: str) -> float:
    """Compare the final number of a response with the record's answer.

    Args:
        record: A line of `held_out.jsonl`; `answer` is its final number, a string.
        response: What the policy wrote, decoded.

    Returns:
        1.0 if the two numbers are equal (1,687.50 equals 1687.5), else 0.0.

    Raises:
        ValueError: If the record's answer is not a number.
    """
    expected = final_number(str(record["answer"]))
    if expected is None:
        raise ValueError(f"record {record.get('id')!r}: the answer {record['answer']!r} is not a number")
    return float(final_number(response) == expected)
