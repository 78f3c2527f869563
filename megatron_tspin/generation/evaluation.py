"""What a policy does on the held-out examples."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from megatron_tspin.config import Config
from megatron_tspin.data.annotated import Example, read_examples
from megatron_tspin.data.indexed import open_documents
from megatron_tspin.generation.player import Player
from megatron_tspin.generation.scorer import Scorer, load_scorer, score_answer
from megatron_tspin.generation.shards import Prompt
from megatron_tspin.objective.scoring import score_pairs
from megatron_tspin.records import DecodingResult, Evaluation, Response
from megatron_tspin.run_folder import HELD_OUT, document_stem, examples_path, held_out_answers


def evaluate_policy(config: Config, player: Player, policy: int, data: Path, results: Path) -> Evaluation:
    """Answers the held-out prompts greedily and by sampling, scores the answers, and scores the annotated responses.

    Args:
        config: Which decodings are wanted, and the scorer.
        player: The policy.
        policy: Its number in the run.
        data: Folder of the run's documents.
        results: File that they are meant for; the shards of answers go beside it.
    """
    examples = read_examples(examples_path(data, HELD_OUT))
    prompts = open_documents(document_stem(data, HELD_OUT, "prompt"))
    annotated = open_documents(document_stem(data, HELD_OUT, "annotated"))
    wanted = [Prompt(example.id, prompts[index]) for index, example in enumerate(examples)]
    scorer = load_scorer(config.evaluation.scorer) if config.evaluation.scorer else None
    found: dict[str, list[Response]] = {}
    if config.evaluation.greedy:
        found["greedy"] = player.answer(
            wanted, f"held-out/{policy}/greedy", held_out_answers(results, "greedy"), greedy=True
        )
    if config.evaluation.sampled:
        found["sampled"] = player.answer(wanted, f"held-out/{policy}/sampled", held_out_answers(results, "sampled"))
    pairs = [(prompts[index], annotated[index]) for index in range(len(examples))]
    log_probs = score_pairs(player.model, player.topology, pairs, description=f"held-out/{policy}/annotated")
    scored = {name: decoding_result(examples, responses, scorer) for name, responses in found.items()}
    sampled = found.get("sampled")
    return Evaluation(
        iteration=policy,
        greedy=scored.get("greedy"),
        sampled=scored.get("sampled"),
        log_prob_annotated=fmean(log_probs),
        log_prob_sampled=fmean(sum(response.token_log_probs) for response in sampled) if sampled else None,
        nll_per_token=-sum(log_probs) / sum(len(response) for _, response in pairs),
    )


def decoding_result(
    examples: Sequence[Example], responses: Sequence[Response], scorer: Scorer | None
) -> DecodingResult:
    """Scores answers; one that did not end is wrong whatever it says.

    The standard error is that of the mean of independent examples.
    """
    scores: list[float] | None = None
    if scorer is not None:
        scores = [
            score_answer(scorer, example.record, response.text, example.id) if response.ended else 0.0
            for example, response in zip(examples, responses, strict=True)
        ]
    return DecodingResult(
        num_prompts=len(responses),
        accuracy=fmean(scores) if scores else None,
        standard_error=_standard_error(scores) if scores else None,
        ended_share=fmean(response.ended for response in responses),
        mean_tokens=fmean(len(response.response_ids) for response in responses),
    )


def _standard_error(scores: Sequence[float]) -> float | None:
    count = len(scores)
    if count < 2:
        return None
    mean = fmean(scores)
    return math.sqrt(sum((score - mean) ** 2 for score in scores) / (count - 1) / count)
