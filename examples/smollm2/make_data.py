"""Write annotated and held-out grade-school maths questions from reasoning-gym's `gsm_symbolic`.

    python examples/smollm2/make_data.py --out DIR --train 256 --held-out 128 --seed 1

Each line of `annotated.jsonl` and `held_out.jsonl` is `{"id", "prompt", "response", "answer"}`; the response is the
worked solution and ends in a line `#### answer`.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    import reasoning_gym
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"make_data.py needs reasoning-gym ({error}): pip install -r examples/smollm2/requirements.txt"
    ) from error

logger = logging.getLogger(__name__)

DATASET = "gsm_symbolic"
SEED_STRIDE = 1_000_000  # example i of a dataset is drawn from seed + i, so neighbouring seeds share examples
CANDIDATES_PER_EXAMPLE = 4
FLOAT_NOISE = re.compile(r"\.\d{5,}")  # 52 * 0.3333333333333333: not a line to imitate
FINAL_LINE = re.compile(r"####[^\n]*\s*\Z")


@dataclass(frozen=True)
class Example:
    """One line of a data file.

    Attributes:
        id: `gsm_symbolic-` and the seed that the example was drawn from.
        prompt: The question.
        response: The worked solution, its last line `#### answer`.
        answer: The final number, for the scorer.
    """

    id: str
    prompt: str
    response: str
    answer: str


def candidates(first_seed: int, size: int) -> Iterator[Example]:
    """Draw questions.

    Args:
        first_seed: Example i comes from `first_seed + i`; the first examples do not depend on `size`.
        size: How many to draw.

    Yields:
        Examples with a clean worked solution; others are left out.

    Raises:
        ValueError: If a worked solution does not end in a `####` line.
    """
    dataset = reasoning_gym.create_dataset(DATASET, seed=first_seed, size=size)
    for index in range(size):
        with contextlib.redirect_stdout(io.StringIO()):  # some of the library's generators print their numbers
            entry = dataset[index]
        solution, answer = entry["metadata"]["answer_cot"], entry["answer"]
        if FLOAT_NOISE.search(solution):
            continue
        response, replaced = FINAL_LINE.subn(f"#### {answer}", solution)  # the library may write 36.0 for 36
        if replaced != 1:
            raise ValueError(f"a worked solution has no final '#### answer' line: {solution!r}")
        yield Example(f"{DATASET}-{first_seed + index}", entry["question"], response, answer)


def draw(first_seed: int, count: int, taken: set[str]) -> list[Example]:
    """Draw examples whose questions are all different.

    Args:
        first_seed: Where the range of seeds starts.
        count: How many examples to return.
        taken: Questions that must not be used; those returned are added.

    Returns:
        `count` examples.

    Raises:
        ValueError: If the range of seeds does not hold enough different questions.
    """
    size = count * CANDIDATES_PER_EXAMPLE
    if size > SEED_STRIDE:
        raise ValueError(f"{count} examples are too many: at most {SEED_STRIDE // CANDIDATES_PER_EXAMPLE} a file")
    examples: list[Example] = []
    for example in candidates(first_seed, size):
        if len(examples) == count:
            break
        if example.prompt not in taken:
            taken.add(example.prompt)
            examples.append(example)
    if len(examples) < count:
        raise ValueError(f"found only {len(examples)} of {count} different questions: ask for fewer")
    return examples


def write(path: Path, examples: Sequence[Example]) -> None:
    """Write one JSON object a line, under a temporary name until the file is complete."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    lines = (json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples)
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)
    logger.info("wrote %d examples to %s", len(examples), path)


def positive(text: str) -> int:
    """Parse a count that must be at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a count: give at least 1")
    return value


def seed(text: str) -> int:
    """Parse a seed that must be at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is not a seed: give 0 or more")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the held-out questions first, so that they stay the same when `--train` grows."""
    parser = argparse.ArgumentParser(description="Write annotated.jsonl and held_out.jsonl.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=positive, required=True, help="number of annotated examples")
    parser.add_argument("--held-out", type=positive, required=True, help="number of held-out examples")
    parser.add_argument("--seed", type=seed, required=True, help="another seed gives other questions")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    first_seed = 2 * SEED_STRIDE * options.seed
    taken: set[str] = set()
    held_out = draw(first_seed + SEED_STRIDE, options.held_out, taken)
    annotated = draw(first_seed, options.train, taken)
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / "annotated.jsonl", annotated)
    write(options.out / "held_out.jsonl", held_out)


if __name__ == "__main__":
    main()
