"""The stages that run the policy in the generation layout: roll out a policy, answer a file, evaluate."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch.distributed as dist

from megatron_tspin.checkpoint.policies import policy_checkpoint
from megatron_tspin.config import Config
from megatron_tspin.data.annotated import Example, read_examples
from megatron_tspin.data.indexed import Documents, open_documents, write_documents
from megatron_tspin.data.paths import HELD_OUT, TRAIN, document_stem, examples_path
from megatron_tspin.data.role_documents import binding_facts
from megatron_tspin.errors import InputError
from megatron_tspin.generation.evaluation import evaluate_policy
from megatron_tspin.generation.player import Player, load_player
from megatron_tspin.generation.shards import Prompt
from megatron_tspin.objective.roles import stored_roles
from megatron_tspin.parallel import distributed
from megatron_tspin.records import Response, RolloutSummary, read_json_lines
from megatron_tspin.run_folder import RunFolder
from megatron_tspin.storage import write_json, write_text


@contextmanager
def _player(config: Config, load: Path | None, policy: int) -> Iterator[Player]:
    """The policy in the generation layout, inside its process group."""
    layout = config.generation_layout()
    with distributed(layout, config.seed) as topology:
        checkpoint = load or policy_checkpoint(RunFolder(Path(config.run_dir)), policy, topology)
        yield load_player(config, layout, topology, checkpoint)


def rollout_run(config: Config, iteration: int) -> None:
    """Everything a run wants of policy number `iteration`, in one process group.

    Evaluates it on the held-out examples; while an iteration is left to train, lets it answer the training prompts
    (y'), and as the initial policy answers them once more for the proto responses (y0).
    """
    folder = RunFolder(Path(config.run_dir))
    evaluates = config.data.held_out is not None
    last = iteration >= config.self_play.iterations
    wanted = () if last else stored_roles(config.objective.method)
    if not evaluates and "synthetic" not in wanted:
        return
    with _player(config, None, iteration) as player:
        if evaluates:
            _evaluate(config, player, iteration, folder.evaluation(iteration))
        if "proto" in wanted and iteration == 0:
            _answer_training_prompts(player, folder, "proto", "proto", folder.proto, folder.data)
        if "synthetic" in wanted:
            shards, purpose = folder.synthetic(iteration), f"synthetic/{iteration}"
            _answer_training_prompts(player, folder, "synthetic", purpose, shards, folder.iteration(iteration))


def _answer_training_prompts(
    player: Player, folder: RunFolder, role: str, purpose: str, shards: Path, documents: Path
) -> None:
    """Generates a role's responses and writes them as documents and a summary."""
    prompts = open_documents(document_stem(folder.data, TRAIN, "prompt"))
    ids = [example.id for example in read_examples(examples_path(folder.data, TRAIN))]
    wanted = [Prompt(identifier, prompts[index]) for index, identifier in enumerate(ids)]
    responses = player.answer(wanted, purpose, shards)
    if player.topology.speaks:
        facts = {**binding_facts(prompts), **player.facts, "purpose": purpose}
        stem = document_stem(documents, TRAIN, role)
        write_documents(stem, [response.response_ids for response in responses], player.vocab_size, facts)
        annotated = open_documents(document_stem(folder.data, TRAIN, "annotated"))
        write_json(shards / "summary.json", summarise(responses, player.eos_id, annotated).model_dump())
    dist.barrier()


def summarise(responses: Sequence[Response], eos_id: int, annotated: Documents) -> RolloutSummary:
    """What a role's responses look like as a whole."""
    count = len(responses)
    identical = sum(response.response_ids == annotated[index] for index, response in enumerate(responses))
    return RolloutSummary(
        num_responses=count,
        ended_share=fmean(response.ended for response in responses),
        empty_share=fmean(response.response_ids == [eos_id] for response in responses),
        identical_share=identical / count,
        mean_tokens=fmean(len(response.response_ids) for response in responses),
        mean_log_prob=fmean(sum(response.token_log_probs) for response in responses),
    )


def _evaluate(config: Config, player: Player, policy: int, output: Path) -> None:
    if output.is_file():
        return
    folder = RunFolder(Path(config.run_dir))
    evaluation = evaluate_policy(config, player, policy, folder.data, output.with_suffix(""))
    if player.topology.speaks:
        write_text(output, evaluation.model_dump_json(indent=2) + "\n")
    dist.barrier()


def evaluate_file(config: Config, load: Path, iteration: int, output: Path) -> None:
    """Evaluates a checkpoint on the run's held-out examples.

    Args:
        config: The run, whose `tokenize` stage is done.
        load: The checkpoint.
        iteration: Number to report it under; also part of the key of the sampled answers.
        output: JSON file (`records.Evaluation`); the answers go into a folder of the same name.
    """
    if config.data.held_out is None or not examples_path(RunFolder(Path(config.run_dir)).data, HELD_OUT).is_file():
        raise InputError("nothing to evaluate on: set data.held_out (--held-out) and run `tspin tokenize` first")
    with _player(config, load, iteration) as player:
        _evaluate(config, player, iteration, output)


def generate_file(config: Config, load: Path, prompts: Path, output: Path, iteration: int) -> None:
    """Answers the prompts of a JSONL file.

    Args:
        config: Template, tokenizer, decoding and layout.
        load: The checkpoint that answers.
        prompts: Lines with `prompt`, or `messages` up to the answer.
        output: Folder for the shards.
        iteration: Part of the key of the randomness.
    """
    examples = _read_prompts(prompts)
    with _player(config, load, iteration) as player:
        ids = player.template.prompt_ids(examples)
        wanted = [Prompt(example.id, prompt) for example, prompt in zip(examples, ids, strict=True)]
        player.check_lengths(wanted, prompts)
        player.answer(wanted, f"generate/{iteration}", output)


def _read_prompts(path: Path) -> list[Example]:
    """Prompts without answers."""
    examples: list[Example] = []
    problems: list[str] = []
    line_of: dict[str, int] = {}
    for number, value in read_json_lines(path):
        messages = _before_answer(value.get("messages"))
        prompt = "\n\n".join(message["content"] for message in messages) if messages else value.get("prompt")
        identifier = str(value.get("id", number))
        if not isinstance(prompt, str) or not prompt:
            problems.append(f"{path}:{number}: needs `prompt` as text, or `messages` with `role` and `content`")
        elif identifier in line_of:
            problems.append(f"{path}:{number}: the id {identifier!r} is that of line {line_of[identifier]} too")
        else:
            line_of[identifier] = number
            examples.append(Example(id=identifier, prompt=prompt, response="", messages=messages, record=value))
    if problems or not examples:
        raise InputError("\n".join(problems) or f"{path}: no prompts")
    return examples


def _before_answer(messages: Any) -> list[dict[str, str]] | None:
    """The messages before the first one of the assistant, which is where training cuts too; None if there are none."""
    found: list[dict[str, str]] = []
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return None
        if message["role"] == "assistant":
            break
        found.append({"role": message["role"], "content": message["content"]})
    return found or None
