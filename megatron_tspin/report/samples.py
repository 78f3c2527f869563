"""A few held-out prompts with the annotated answer and what the policy answered before and after."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron_tspin.errors import InputError
from megatron_tspin.records import Response, read_json_lines, read_records
from megatron_tspin.report.run_data import RunData
from megatron_tspin.run_folder import HELD_OUT, RunFolder, examples_path, held_out_answers, shard_paths

NUM_SAMPLES = 3
_MOST_CHARACTERS = 4000


@dataclass(frozen=True)
class Answer:
    """A text with what a reader needs to judge it."""

    title: str
    text: str
    note: str
    is_cut: bool
    """Whether the answer reached the limit on new tokens."""


@dataclass(frozen=True)
class Sample:
    """One held-out prompt."""

    id: str
    prompt: str
    annotated: Answer
    answers: list[Answer]


def load_samples(run: RunData) -> list[Sample]:
    """The first held-out prompts; empty without held-out data. What cannot be read goes to `run.problems`."""
    path = examples_path(RunFolder(run.path).data, HELD_OUT)
    if not path.is_file():
        return []
    try:
        lines = [value for _, value in islice(read_json_lines(path), NUM_SAMPLES)]
    except InputError as error:
        run.problems.append(f"{error}. The report shows no samples.")
        return []
    examples = [
        (str(line.get("id", number)), str(line.get("prompt", "")), str(line.get("response", "")))
        for number, line in enumerate(lines)
    ]
    wanted = {name for name, _, _ in examples}
    found = [(title, _responses(run, folder, wanted)) for title, folder in _policies(run)]
    return [
        Sample(
            name,
            _shorten(prompt),
            Answer("annotated", _shorten(response), "", False),
            [_answer(title, responses[name]) for title, responses in found if name in responses],
        )
        for name, prompt, response in examples
    ]


def _policies(run: RunData) -> Iterator[tuple[str, Path]]:
    """Folders of the first and the last policy's answers: greedy ones if there are any."""
    numbers = sorted(run.evaluations)
    for number in dict.fromkeys((*numbers[:1], *numbers[-1:])):
        evaluation = RunFolder(run.path).evaluation(number)
        when = "before" if number == 0 else f"after {number} iteration" + ("" if number == 1 else "s")
        for decoding in ("greedy", "sampled"):
            folder = held_out_answers(evaluation, decoding)
            if shard_paths(folder):
                yield f"{when} ({decoding})", folder
                break


def _responses(run: RunData, folder: Path, wanted: set[str]) -> dict[str, Response]:
    """The wanted responses by prompt id; reads no further than needed."""
    found: dict[str, Response] = {}
    try:
        for path in shard_paths(folder):
            for response in read_records(path, Response):
                if response.id in wanted:
                    found[response.id] = response
            if len(found) == len(wanted):
                break
    except InputError as error:
        run.problems.append(f"{error}. Some samples are missing.")
    return found


def _answer(title: str, response: Response) -> Answer:
    ending = "ended" if response.ended else "cut off, no EOS"
    log_prob = sum(response.token_log_probs)
    note = f"{len(response.response_ids)} tokens, {ending}, log-prob {log_prob:.1f}".replace("-prob -", "-prob −")
    return Answer(title, _shorten(response.text), note, not response.ended)


def _shorten(text: str) -> str:
    more = len(text) - _MOST_CHARACTERS
    return text if more <= 0 else f"{text[:_MOST_CHARACTERS]} … ({more:,} more characters)"
