"""`python -m megatron_tspin.generation.scorer_trial SCORER EXAMPLE SECONDS ANSWER`: a scorer on one example.

Reads the example (`data.annotated.Example`) from a file. Writes null or what is wrong as JSON to ANSWER; a process that
ends before that says by its end that something is. No torch here, unless the scorer brings it.
"""

import json
import sys
from pathlib import Path

from megatron_tspin.data.annotated import Example
from megatron_tspin.errors import InputError
from megatron_tspin.generation.scorer import load_scorer, score_answer


def main(scorer: str, example: str, seconds: str, answer: str) -> None:
    """Tries the scorer; see the module."""
    problem = None
    try:
        first = Example.model_validate_json(Path(example).read_bytes())
        score_answer(load_scorer(scorer), first.record, first.response, first.id, float(seconds))
    except InputError as error:
        problem = str(error)
    Path(answer).write_text(json.dumps(problem), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
