"""Reads what `tspin score` is asked to score: text, or token ids as they are."""

from pathlib import Path
from typing import Any

from megatron_tspin.config import Config
from megatron_tspin.data.annotated import Example
from megatron_tspin.data.template import PromptTemplate
from megatron_tspin.data.tokenization import load_run_tokenizer
from megatron_tspin.errors import InputError
from megatron_tspin.records import read_json_lines

Pair = tuple[list[int], list[int]]


def read_scoring_input(config: Config, data: Path, vocab_size: int) -> tuple[list[str], list[Pair]]:
    """Returns the ids of the lines and their prompt and response ids.

    Text responses get the closing EOS; ids are scored as they are.

    Raises:
        InputError: A line has neither form, or an id outside the vocabulary; all such lines in one message.
    """
    ids: list[str] = []
    pairs: list[Pair | None] = []
    texts: list[tuple[int, Example]] = []
    problems: list[str] = []
    for number, value in read_json_lines(data):
        ids.append(str(value.get("id", number)))
        pairs.append(None)
        try:
            if "prompt_ids" in value:
                pairs[-1] = (_ids(value, "prompt_ids", vocab_size), _ids(value, "response_ids", vocab_size))
            else:
                texts.append((len(pairs) - 1, _example(value, ids[-1])))
        except ValueError as error:
            problems.append(f"{data}:{number}: {error}")
    if problems:
        raise InputError("\n".join(problems))
    if not pairs:
        raise InputError(f"{data}: no lines to score")
    if texts:
        tokenizer = load_run_tokenizer(config)
        prompts = PromptTemplate(config.data.template, tokenizer).prompt_ids([example for _, example in texts])
        answers = tokenizer.encode_batch([example.response for _, example in texts], add_special_tokens=False)
        for (index, _), prompt, answer in zip(texts, prompts, answers, strict=True):
            pairs[index] = (prompt, [*answer, tokenizer.eos_id])
    return ids, [pair for pair in pairs if pair is not None]


def _ids(value: dict[str, Any], key: str, vocab_size: int) -> list[int]:
    tokens = value.get(key)
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
        raise ValueError(f"`{key}` must be a list of one or more token ids")
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise ValueError(f"`{key}` holds ids outside the vocabulary of {vocab_size} tokens")
    return tokens


def _example(value: dict[str, Any], identifier: str) -> Example:
    for key in ("prompt", "response"):
        if not isinstance(value.get(key), str) or not value[key]:
            raise ValueError(f"needs `{key}` as text, or `prompt_ids` and `response_ids` as lists of token ids")
    return Example(id=identifier, prompt=value["prompt"], response=value["response"], messages=None, record=value)
