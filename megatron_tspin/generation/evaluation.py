"""What a policy does on the held-out examples."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_tspin.config import Config
from megatron_tspin.data.annotated import Example, read_examples
from megatron_tspin.data.encoding import EncodedExamples, Encoder
from megatron_tspin.data.indexed import open_documents
from megatron_tspin.data.splits import Split
from megatron_tspin.generation.player import Player
from megatron_tspin.generation.scorer import Scorer, load_scorer, score_answer, scorer_digest
from megatron_tspin.generation.shards import Prompt, Request, read_shards
from megatron_tspin.heartbeat import busy
from megatron_tspin.objective.scoring import score_pairs
from megatron_tspin.parallel import Topology, on_first_rank
from megatron_tspin.records import DecodingResult, Evaluation, Response
from megatron_tspin.run_folder import HELD_OUT, document_stem, examples_path, held_out_answers


@dataclass(frozen=True)
class HeldOut:
    """Held-out examples with the ids of prompts and annotated responses; the three run in parallel."""

    examples: Sequence[Example]
    prompts: Sequence[Sequence[int]]
    annotated: Sequence[Sequence[int]]

    def fingerprint(self) -> str:
        """Hex SHA-256 of all that an evaluation reads of them."""
        digest = hashlib.sha256()
        for example, *ids in zip(self.examples, self.prompts, self.annotated, strict=True):
            digest.update(json.dumps([example.model_dump(), *map(list, ids)]).encode())
        return digest.hexdigest()


def of_run(data: Path) -> HeldOut:
    """The held-out examples of a run's data folder, as `tspin tokenize` left them."""
    prompts, annotated = (open_documents(document_stem(data, HELD_OUT, key)) for key in ("prompt", "annotated"))
    whole = [[documents[index] for index in range(len(documents))] for documents in (prompts, annotated)]
    return HeldOut(read_examples(examples_path(data, HELD_OUT)), *whole)


def of_split(config: Config, split: Split, player: Player) -> HeldOut:
    """Held-out examples as the user has them, encoded as `tspin tokenize` does.

    Raises:
        InputError: Lines cannot be used, or do not fit; see `data.encoding.Encoder`.
    """
    encoder = Encoder(config, player.template, player.tokenizer.endings.stops)
    encoded = EncodedExamples()
    for batch in encoder.encode(split.source, HELD_OUT, split()):
        encoded.extend(batch)
    return HeldOut(encoded.examples, encoded.prompts, encoded.responses)


def decides(config: Config, player: Player, held_out: HeldOut) -> dict[str, Any]:
    """Everything that decides about an evaluation's results; kept with them, so that none is taken for another."""
    decodings = {name: vars(player.decoding(name == "greedy")) for name in _decodings(config)}
    scorer = config.evaluation.scorer
    return {
        **player.facts,
        "seed": config.seed,
        "held_out": held_out.fingerprint(),
        "decodings": decodings,
        "scorer": None if scorer is None else [scorer.rpartition(":")[2], scorer_digest(scorer)],
    }


def _decodings(config: Config) -> list[str]:
    wanted = {"greedy": config.evaluation.greedy, "sampled": config.evaluation.sampled}
    return [name for name, is_wanted in wanted.items() if is_wanted]


def evaluate_policy(config: Config, player: Player, policy: int, held_out: HeldOut, results: Path) -> Evaluation:
    """Answers the held-out prompts greedily and by sampling, scores the answers, and scores the annotated responses.

    Args:
        config: Which decodings are wanted, and the scorer, which runs on rank 0 alone.
        player: The policy.
        policy: Its number in the run.
        held_out: The examples.
        results: File that they are meant for; the shards of answers go beside it.

    Returns:
        The results, on every rank.

    Raises:
        InputError: The scorer cannot be loaded (before anything is answered), or failed.
    """
    topology = player.topology
    scorer = _load_on_first_rank(config.evaluation.scorer, topology)
    prompts = held_out.prompts
    wanted = [Prompt(example.id, ids) for example, ids in zip(held_out.examples, prompts, strict=True)]
    folders = {name: held_out_answers(results, name) for name in _decodings(config)}
    requests = {
        name: player.answer(wanted, f"held-out/{policy}/{name}", folder, greedy=name == "greedy")
        for name, folder in folders.items()
    }
    pairs = list(zip(prompts, held_out.annotated, strict=True))
    log_probs = score_pairs(player.model, topology, pairs, description=f"held-out/{policy}/annotated")
    seconds = config.evaluation.scorer_seconds
    judged = on_first_rank(lambda: _judged(requests, folders, held_out.examples, scorer, seconds), topology)
    return Evaluation(
        iteration=policy,
        log_prob_annotated=fmean(log_probs),
        nll_per_token=-sum(log_probs) / sum(len(response) for _, response in pairs),
        **judged,
    )


def _judged(
    requests: Mapping[str, Request],
    folders: Mapping[str, Path],
    examples: Sequence[Example],
    scorer: Scorer | None,
    seconds: float,
) -> dict[str, Any]:
    """What an `Evaluation` says of the answers in the shards."""
    found = {name: read_shards(request, folders[name]) for name, request in requests.items()}
    results = {name: decoding_result(examples, responses, scorer, seconds) for name, responses in found.items()}
    sampled = found.get("sampled")
    log_prob = fmean(sum(response.token_log_probs) for response in sampled) if sampled else None
    return {"greedy": results.get("greedy"), "sampled": results.get("sampled"), "log_prob_sampled": log_prob}


def _load_on_first_rank(name: str | None, topology: Topology) -> Scorer | None:
    """The scorer on rank 0, None elsewhere: a judge of the user's own may be large, or count its calls.

    Raises:
        InputError: It cannot be loaded; on all ranks.
    """
    loaded: list[Scorer] = []
    if name is not None:
        on_first_rank(lambda: loaded.append(load_scorer(name)), topology)
    return loaded[0] if loaded else None


def decoding_result(
    examples: Sequence[Example], responses: Sequence[Response], scorer: Scorer | None, seconds: float = math.inf
) -> DecodingResult:
    """Scores answers; one that did not end is wrong whatever it says.

    The standard error is that of the mean of independent examples.
    """
    scores: list[float] | None = None
    if scorer is not None:
        scores = []
        for example, response in zip(examples, responses, strict=True):
            with busy(f"scoring the answer to {example.id}"):
                scores.append(_score(scorer, example, response, seconds))
    return DecodingResult(
        num_prompts=len(responses),
        accuracy=fmean(scores) if scores else None,
        standard_error=_standard_error(scores) if scores else None,
        ended_share=fmean(response.ended for response in responses),
        mean_tokens=fmean(len(response.response_ids) for response in responses),
    )


def _score(scorer: Scorer, example: Example, response: Response, seconds: float) -> float:
    return score_answer(scorer, example.record, response.text, example.id, seconds) if response.ended else 0.0


def _standard_error(scores: Sequence[float]) -> float | None:
    count = len(scores)
    if count < 2:
        return None
    mean = fmean(scores)
    return math.sqrt(sum((score - mean) ** 2 for score in scores) / (count - 1) / count)
