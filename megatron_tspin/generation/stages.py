"""The stages that run the policy in the generation layout: roll out a policy, answer a file, evaluate."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from megatron_tspin.checkpoint.policies import policy_checkpoint
from megatron_tspin.config import Config
from megatron_tspin.data.annotated import read_examples
from megatron_tspin.data.indexed import Documents, open_documents, write_documents
from megatron_tspin.data.role_documents import binding_facts
from megatron_tspin.data.user_examples import read_prompts
from megatron_tspin.errors import InputError
from megatron_tspin.generation.evaluation import evaluate_policy
from megatron_tspin.generation.player import Player, load_player
from megatron_tspin.generation.shards import Prompt, read_shards
from megatron_tspin.objective.roles import stored_roles
from megatron_tspin.parallel import Topology, distributed, on_first_rank, wait_for_all_ranks
from megatron_tspin.records import Response, RolloutSummary
from megatron_tspin.run_folder import HELD_OUT, TRAIN, RunFolder, document_stem, examples_path, shard_summary
from megatron_tspin.storage import write_json, write_text


@contextmanager
def _player(config: Config, load: Path | None, policy: int) -> Iterator[Player]:
    """The policy in the generation layout, inside its process group."""
    with distributed(config.generation_layout(), config.seed) as topology:
        yield _load(config, topology, load, policy)


def _load(config: Config, topology: Topology, load: Path | None, policy: int) -> Player:
    """The checkpoint `load`, or the run's own of policy number `policy`."""
    checkpoint = load or policy_checkpoint(RunFolder(Path(config.run_dir)), policy, topology)
    player = load_player(config, config.generation_layout(), topology, checkpoint)
    wait_for_all_ranks()  # reading takes one rank longer than another; what follows waits no longer than a step does
    return player


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
    request = player.answer(wanted, purpose, shards)

    def write() -> None:
        responses = read_shards(request, shards)
        facts = {**binding_facts(prompts), **player.facts, "purpose": purpose}
        stem = document_stem(documents, TRAIN, role)
        write_documents(stem, [response.response_ids for response in responses], player.vocab_size, facts)
        annotated = open_documents(document_stem(folder.data, TRAIN, "annotated"))
        write_json(shard_summary(shards), summarise(responses, player.eos_id, annotated).model_dump())

    on_first_rank(write, player.topology)


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
    if on_first_rank(output.is_file, player.topology):
        return
    folder = RunFolder(Path(config.run_dir))
    evaluation = evaluate_policy(config, player, policy, folder.data, output)
    on_first_rank(lambda: write_text(output, evaluation.model_dump_json(indent=2) + "\n"), player.topology)


def evaluate_file(config: Config, load: Path, iteration: int, output: Path) -> None:
    """Evaluates a checkpoint on the run's held-out examples.

    Args:
        config: The run, whose `tokenize` stage is done.
        load: The checkpoint.
        iteration: Number to report it under; also part of the key of the sampled answers.
        output: JSON file (`records.Evaluation`); the answers go into a folder of the same name.
    """
    examples = examples_path(RunFolder(Path(config.run_dir)).data, HELD_OUT)

    def refuse_without_examples() -> None:
        if config.data.held_out is None or not examples.is_file():
            raise InputError("nothing to evaluate on: set data.held_out (--held-out) and run `tspin tokenize` first")

    with distributed(config.generation_layout(), config.seed) as topology:
        on_first_rank(refuse_without_examples, topology)
        _evaluate(config, _load(config, topology, load, iteration), iteration, output)


def generate_file(config: Config, load: Path, prompts: Path, output: Path, iteration: int) -> None:
    """Answers the prompts of a JSONL file.

    Args:
        config: Template, tokenizer, decoding and layout.
        load: The checkpoint that answers.
        prompts: Lines with `prompt`, or `messages`, of which the last user message is answered.
        output: Folder for the shards.
        iteration: Part of the key of the randomness.
    """
    examples = read_prompts(prompts)
    with _player(config, load, iteration) as player:
        ids = player.template.prompt_ids(examples)
        wanted = [Prompt(example.id, prompt) for example, prompt in zip(examples, ids, strict=True)]
        player.check_lengths(wanted, prompts)
        player.answer(wanted, f"generate/{iteration}", output)
