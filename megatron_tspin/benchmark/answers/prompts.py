"""Questions of a file as the token ids that a checkpoint is asked with."""

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
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(architecture.folder, local_files_only=True, trust_remote_code=False)
    prompts: list[list[int]] = []
    for number, line in read_json_lines(path):
        text = line.get("prompt")
        if not isinstance(text, str):
            raise InputError(f"{path}:{number}: `prompt` is no text")
        message = [{"role": "user", "content": text}]
        asked = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        prompts.append(list(asked["input_ids"]))
        if len(prompts) == PROMPTS:
            return prompts
    raise InputError(f"{path}: {len(prompts)} questions; the benchmark asks {PROMPTS}")
