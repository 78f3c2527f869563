"""`python -m megatron_tspin.generation.scorer_trial SCORER EXAMPLES SECONDS ANSWER`: a scorer on the first example.

Writes null or what is wrong as JSON to ANSWER; a process that ends before that says by its end that something is. No
torch here, unless the scorer brings it.
"""

import json
import sys
from pathlib import Path

from megatron_tspin.data.user_examples import read_annotated
from megatron_tspin.errors import InputError
from megatron_tspin.generation.scorer import load_scorer, score_answer


def main(scorer: str, examples: str, seconds: str, answer: str) -> None:
    """Tries the scorer; see the module."""
    problem = None
    try:
        first = read_annotated(Path(examples))[0]
        score_answer(load_scorer(scorer), first.record, first.response, first.id, float(seconds))
    except InputError as error:
        problem = str(error)
    Path(answer).write_text(json.dumps(problem), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
