"""Scorer of the quickstart task: is the final answer of a response the right one?"""

from collections.abc import Mapping
from typing import Any

ANSWER_MARK = "="


def final_answer(response: str) -> str:
    """Return what follows the last ``=`` of a response, or the whole response where there is none."""
    return response.rsplit(ANSWER_MARK, maxsplit=1)[-1]


def score(record: Mapping[str, Any], response: str) -> float:
    """Score one response to one record of ``annotated.jsonl`` or ``held_out.jsonl``.

    Only the final answer counts: a bare ``dbac`` and a worked ``d,b,a,c=dbac`` are both right for ``reverse cabd``.
    That the response ended with EOS is for the caller to check, because the text does not show it.

    Args:
        record: A line of the data; only ``record["response"]``, the annotated response, is read.
        response: The decoded response, without its EOS.

    Returns:
        1.0 when the final answers are equal, else 0.0.

    Raises:
        KeyError: When the record has no annotated response.
    """
    return float(final_answer(response) == final_answer(record["response"]))
