"""The stages that run the policy in the generation layout: roll out a policy, answer a file, evaluate."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_tspin.checkpoint.policies import policy_checkpoint
from megatron_tspin.config import Config, ParallelSection
from megatron_tspin.data.annotated import read_ids
from megatron_tspin.data.indexed import Documents, open_documents, write_documents
from megatron_tspin.data.role_documents import binding_facts
from megatron_tspin.data.splits import splits_of
from megatron_tspin.data.tokenizer import Tokenizer
from megatron_tspin.data.user_examples import read_prompts
from megatron_tspin.errors import InputError
from megatron_tspin.generation.backends.vllm import remove_served
from megatron_tspin.generation.evaluation import HeldOut, decides, evaluate_policy, of_run, of_split
from megatron_tspin.generation.layout import generation_layout
from megatron_tspin.generation.player import Player, load_player
from megatron_tspin.generation.shards import Prompt, read_shards, remove_shards
from megatron_tspin.log import get_logger
from megatron_tspin.objective.roles import stored_roles
from megatron_tspin.parallel import Topology, distributed, on_first_rank, refuse_stale_facts, wait_for_all_ranks
from megatron_tspin.records import Response, RolloutSummary
from megatron_tspin.run_folder import (
    HELD_OUT,
    TRAIN,
    RunFolder,
    document_stem,
    examples_path,
    held_out_answers,
    serving_beside,
    shard_summary,
)
from megatron_tspin.storage import read_json, refuse_existing, write_json, write_text

_log = get_logger(__name__)


@contextmanager
def _player(
    config: Config, layout: ParallelSection, topology: Topology, load: Path | None, policy: int, serving: Path
) -> Iterator[Player]:
    """The checkpoint `load`, or the run's own of policy number `policy`, inside the process group of the layout.

    What servers are given of it lies in `serving` until the block ends well: after a failure it is there to go on with.
    """
    checkpoint = load or policy_checkpoint(RunFolder(Path(config.run_dir)), policy, topology)
    player = load_player(config, layout, topology, checkpoint, serving)
    with closing(player.backend):
        wait_for_all_ranks()  # reading takes one rank longer than another; what follows waits as long as a step does
        yield player
    on_first_rank(lambda: remove_served(serving), topology)


def rollout_run(config: Config, iteration: int) -> None:
    """Everything a run wants of policy number `iteration`, in one process group.

    Evaluates it on the held-out examples; while an iteration is left to train, lets it answer the training prompts
    (y'), and as the initial policy answers them once more for the proto responses (y0).
    """
    folder = RunFolder(Path(config.run_dir))
    evaluates = config.data.has_held_out
    last = iteration >= config.self_play.iterations
    wanted = () if last else stored_roles(config.objective.method)
    if not evaluates and "synthetic" not in wanted:
        return
    layout = generation_layout(config)
    with (
        distributed(layout, config.seed) as topology,
        _player(config, layout, topology, None, iteration, folder.serving) as player,
    ):
        if evaluates:
            _evaluate(config, player, iteration, of_run(folder.data), folder.evaluation(iteration), keep=True)
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
    ids = read_ids(examples_path(folder.data, TRAIN))
    wanted = [Prompt(identifier, prompts[index]) for index, identifier in enumerate(ids)]
    request = player.answer(wanted, purpose, shards)

    def write() -> None:
        responses = read_shards(request, shards)
        facts = {**binding_facts(prompts), **player.facts, "purpose": purpose}
        stem = document_stem(documents, TRAIN, role)
        write_documents(stem, [response.response_ids for response in responses], player.vocab_size, facts)
        annotated = open_documents(document_stem(folder.data, TRAIN, "annotated"))
        write_json(shard_summary(shards), summarise(responses, player.tokenizer, annotated).model_dump())

    on_first_rank(write, player.topology)


def summarise(responses: Sequence[Response], tokenizer: Tokenizer, annotated: Documents) -> RolloutSummary:
    """What a role's responses look like as a whole."""
    count = len(responses)
    identical = sum(response.response_ids == annotated[index] for index, response in enumerate(responses))
    endings = Counter(response.ended_by for response in responses if response.ended_by is not None)
    return RolloutSummary(
        num_responses=count,
        ended_share=fmean(response.ended for response in responses),
        empty_share=fmean(response.ended and len(response.response_ids) == 1 for response in responses),
        identical_share=identical / count,
        mean_tokens=fmean(len(response.response_ids) for response in responses),
        mean_log_prob=fmean(sum(response.token_log_probs) for response in responses),
        endings={tokenizer.token_text(token): number for token, number in endings.most_common()},
        passed_over=_passed_over(responses, tokenizer),
    )


def _passed_over(responses: Sequence[Response], tokenizer: Tokenizer) -> str | None:
    """The special token that most responses without an end hold: the policy may well mean that as the end."""
    special = tokenizer.special_ids - tokenizer.endings.stops
    endless = [special.intersection(response.response_ids) for response in responses if not response.ended]
    found = Counter(token for tokens in endless for token in tokens).most_common(1)
    return tokenizer.token_text(found[0][0]) if found and 2 * found[0][1] > len(endless) else None


def _evaluate(config: Config, player: Player, policy: int, held_out: HeldOut, output: Path, keep: bool = False) -> None:
    """Writes the results; `keep` leaves the same ones, from exactly the same, as they are."""
    topology = player.topology
    refuse_stale_facts("the held-out examples", {"sha256": held_out.fingerprint()}, topology)
    wanted = on_first_rank(lambda: decides(config, player, held_out), topology)
    if keep and on_first_rank(lambda: _is_of(output, wanted), topology):
        return
    found = evaluate_policy(config, player, policy, held_out, output)
    evaluation = found.model_copy(update={"made_from": wanted})
    on_first_rank(lambda: write_text(output, evaluation.model_dump_json(indent=2) + "\n"), topology)


def _is_of(output: Path, wanted: dict[str, Any]) -> bool:
    """Whether results that depend on exactly this are there."""
    if not output.is_file():
        return False
    found = read_json(output)
    same: bool = isinstance(found, dict) and found.get("made_from") == wanted
    if not same:
        _log.info("%s is made again: policy, examples, scorer or decoding have changed", output)
    return same


def evaluate_file(config: Config, load: Path, iteration: int, output: Path, overwrite: bool) -> None:
    """Evaluates a checkpoint on held-out examples.

    Args:
        config: The held-out examples, how they become ids, how answers are decoded, and the scorer.
        load: The checkpoint.
        iteration: Number to report it under; also part of the key of the sampled answers.
        output: JSON file (`records.Evaluation`); the answers go into a folder of the same name.
        overwrite: Replace results that are there, with their answers.

    Raises:
        InputError: There are no examples, or results are there and not to be replaced.
    """
    split = splits_of(config.data).get(HELD_OUT)
    if split is None:
        raise InputError("nothing to evaluate on: set data.held_out (--held-out)")
    layout = generation_layout(config)
    with distributed(layout, config.seed) as topology:
        on_first_rank(lambda: _make_way(output, overwrite), topology)
        with _player(config, layout, topology, load, iteration, serving_beside(output.with_suffix(""))) as player:
            _evaluate(config, player, iteration, of_split(config, split, player), output)


def _make_way(output: Path, overwrite: bool) -> None:
    refuse_existing(output, overwrite)
    if overwrite:
        for name in ("greedy", "sampled"):
            remove_shards(held_out_answers(output, name))


def generate_file(
    config: Config, load: Path, prompts: Path, output: Path, iteration: int, samples: int = 1, overwrite: bool = False
) -> None:
    """Answers the prompts of a JSONL file. Shards of the same answers that are there are kept.

    Args:
        config: Template, tokenizer, decoding and layout.
        load: The checkpoint that answers.
        prompts: See `user_examples.read_prompts`.
        output: Folder for the shards.
        iteration: Part of the key of the randomness.
        samples: Answers to each prompt; they follow one another in the shards.
        overwrite: Remove the shards of other answers instead of refusing to mix them.
    """
    examples = read_prompts(prompts, config.data)
    layout = generation_layout(config)
    with (
        distributed(layout, config.seed) as topology,
        _player(config, layout, topology, load, iteration, serving_beside(output)) as player,
    ):
        if overwrite:
            on_first_rank(lambda: remove_shards(output), player.topology)
        ids = player.template.prompt_ids(examples)
        wanted = [
            Prompt(example.id, prompt, sample)
            for example, prompt in zip(examples, ids, strict=True)
            for sample in range(samples)
        ]
        player.check_lengths(wanted, prompts)
        player.answer(wanted, f"generate/{iteration}", output)
