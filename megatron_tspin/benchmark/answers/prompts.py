"""Questions of a file as the token ids that a checkpoint is asked with."""

from collections.abc import Sequence
from pathlib import Path

from megatron_tspin.benchmark.answers.settings import PROMPTS
from megatron_tspin.errors import InputError
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.records import read_json_lines


def read_questions(architecture: Architecture, path: Path) -> list[list[int]]:
    """The first questions of JSON lines with a `prompt`, through the checkpoint's chat template.

    Raises:
        InputError: A line has no such text, or there are too few.
    """
    return [prompt for (prompt,) in _read(architecture, path, ("prompt",), PROMPTS)]


def read_examples(architecture: Architecture, path: Path, count: int) -> list[list[list[int]]]:
    """The first so many pairs of a question and its `response`; see `read_questions`."""
    return _read(architecture, path, ("prompt", "response"), count)


def _read(architecture: Architecture, path: Path, fields: Sequence[str], count: int) -> list[list[list[int]]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(architecture.folder, local_files_only=True, trust_remote_code=False)
    found: list[list[list[int]]] = []
    for number, line in read_json_lines(path):
        texts = [line.get(field) for field in fields]
        for field, text in zip(fields, texts, strict=True):
            if not isinstance(text, str):
                raise InputError(f"{path}:{number}: `{field}` is no text")
        message = [{"role": "user", "content": texts[0]}]
        asked = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        others = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[1:]]
        found.append([list(asked["input_ids"]), *[[*ids, tokenizer.eos_token_id] for ids in others]])
        if len(found) == count:
            return found
    raise InputError(f"{path}: {len(found)} questions; the benchmark asks {count}")
