"""What bf16, FP8 or an engine of others does to log-probs, measured on a sample before an iteration's first step.

Each response is scored in fp32 and by the very model that is about to train, in the same rows; y' also has the
log-probs that the generation engine stored when it sampled it. Of an engine that is not our own they are held to a
bound: what it says is all that is known of how it sampled.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from megatron_tspin.checkpoint.shards import bare_policies, sharded_parameters
from megatron_tspin.config import Config
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.errors import ArtifactError, DivergenceError, InputError, ParityError
from megatron_tspin.log import get_logger
from megatron_tspin.models.build import build_chunks, without_storage
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.objective.batches import Triplet
from megatron_tspin.objective.roles import has_reference
from megatron_tspin.objective.scoring import score_pairs
from megatron_tspin.parallel import Topology, on_first_rank
from megatron_tspin.precision import describe
from megatron_tspin.records import Differences, MarginNoise, PrecisionNoise, Response, read_records
from megatron_tspin.run_folder import RunFolder, shard_path, shard_settings
from megatron_tspin.storage import read_json, sha256_file, write_json
from megatron_tspin.training.loop import Trainer
from megatron_tspin.training.precision_noise import Values, differences, margin_noise, share
from megatron_tspin.training.triplet_source import TripletSource

_log = get_logger(__name__)

ByRole = dict[str, Values]


class _NotComparable(Exception):
    """Says why stored log-probs are not those of the same policy and responses."""


@dataclass(frozen=True)
class Rescoring:
    """A sample of an iteration's triplets and their log-probs in fp32, waiting for those of the training precision.

    Attributes:
        config: The run.
        iteration: Self-play iteration.
        topology: The layout.
        start: Checkpoint that the iteration starts from.
        indices: Place of each sampled example in the documents.
        triplets: The examples.
        exact: Log-probs in fp32 by role, float64 [triplets] each.
        seconds: What it took so far.
    """

    config: Config
    iteration: int
    topology: Topology
    start: Path
    indices: Sequence[int]
    triplets: Sequence[Triplet]
    exact: ByRole
    seconds: float


def score_in_fp32(trainer: Trainer, source: TripletSource, start: Path) -> Rescoring | None:
    """Draws the sample and scores it in fp32, all ranks together; None if there is nothing (left) to measure.

    Call it between `load_masters` and the first step: the weights of the fp32 policy are the gradient buffers, where
    `load_masters` has read them to. So it costs no memory, and the checkpoint is not read again. Where training is in
    fp32, its own model is the fp32 policy.

    Args:
        trainer: With the policy that the iteration starts from.
        source: The triplets.
        start: The checkpoint of that policy.

    Raises:
        DivergenceError: A log-prob is not finite even in fp32.
    """
    config, topology, iteration = trainer.config, trainer.topology, trainer.iteration
    if not config.rescores or on_first_rank(_file(config, iteration).is_file, topology):
        return None
    began = time.perf_counter()
    indices = source.sample(config.precision.rescored_prompts)
    triplets = [source.triplet(index) for index in indices]
    model = _in_fp32(trainer) if config.precision.bf16 else bare_policies(trainer.chunks)
    exact = _scores(model, topology, triplets, "log-probs in fp32")
    _refuse_nonfinite(exact, triplets, iteration, "in fp32", "the weights hold NaN or infinity")
    torch.cuda.empty_cache()  # what libraries allocate beside torch finds the room too
    return Rescoring(config, iteration, topology, start, indices, triplets, exact, time.perf_counter() - began)


def _in_fp32(trainer: Trainer) -> list[PolicyModel]:
    """The policy in fp32, with the gradient buffers as its weights."""
    config, trained = trainer.config, bare_policies(trainer.chunks)
    architecture = trained[0].architecture
    tp_size = trainer.topology.tp_size
    with without_storage(architecture.padded_vocab_size(tp_size) // tp_size):
        exact = build_chunks(architecture, config.parallel, config.training, PrecisionSection(), trainer.topology)
    weights = {name: leaf.data.main_grad for name, leaf in sharded_parameters(trained).items()}
    for name, leaf in sharded_parameters(exact).items():
        leaf.data.data = weights[name]
    return exact


def measure_noise(rescoring: Rescoring, model: Sequence[PolicyModel]) -> PrecisionNoise:
    """Scores the sample by the model that is about to train; rank 0 writes the iteration's `precision.json`.

    Args:
        rescoring: Of `score_in_fp32`.
        model: The policy that the iteration starts from, by virtual stages, in the training precision.

    Returns:
        What was written; other ranks than 0 have no drift in it.

    Raises:
        DivergenceError: A log-prob is not finite.
    """
    began = time.perf_counter()
    config = rescoring.config
    formats = describe(config.precision)
    trained = rescoring.exact  # where training is in fp32
    if config.precision.bf16:
        trained = _scores(model, rescoring.topology, rescoring.triplets, "log-probs as trained")
    remedy = "keep more layers out of FP8, take another --fp8-recipe, or leave --fp8-format and then --bf16 out"
    _refuse_nonfinite(trained, rescoring.triplets, rescoring.iteration, f"in {formats}, but are in fp32", remedy)
    noise = _noise(rescoring, trained, formats)
    if rescoring.topology.speaks:
        noise = _with_drift(noise, rescoring, trained)
        noise = noise.model_copy(update={"seconds": rescoring.seconds + time.perf_counter() - began})
        write_json(_file(config, rescoring.iteration), noise.model_dump())
        _log_noise(noise)
    return noise


def refuse_drift(config: Config, iteration: int, topology: Topology) -> None:
    """Demands of an engine of others that training finds the log-probs that it gave. All ranks call it.

    It goes by the iteration's `precision.json`, so that an iteration that was refused stays so when it is begun again.

    Raises:
        ParityError: It does not, or that could not be told.
    """
    if config.bounds_drift:
        on_first_rank(
            lambda: _refuse_drift(_file(config, iteration), iteration, config.generation.drift_bound), topology
        )


def _refuse_drift(path: Path, iteration: int, bound: float) -> None:
    try:
        noise = PrecisionNoise.model_validate(read_json(path))
    except ValidationError as error:
        raise ArtifactError(f"{path}: not what iterations write there; remove it to measure again") from error
    drift = noise.engine_drift
    beginning = f"iteration {iteration}, before the first step:"
    if drift is None:
        reason = noise.no_drift or "it was measured while another engine answered"
        raise ParityError(
            f"{beginning} log-probs of the sampled answers could not be compared with what the engine that sampled "
            f"them said: {reason}; remove {path} and the iteration's answers, then both are made again"
        )
    if not drift.per_token_rms <= bound:
        raise ParityError(
            f"{beginning} the engine that sampled y' gave log-probs that are off by {drift.per_token_rms:.3g} nats a "
            f"token (bound {bound:g}; bias {drift.mean:.3g} nats an answer, largest {drift.largest_absolute:.3g}, of "
            f"prompt {drift.largest_id}): it served other weights, changed its log-probs by temperature or truncation, "
            f"or computes in another way; see docs/vllm.md. {path} has the figures; --tspin-drift-bound is the bound"
        )


def _file(config: Config, iteration: int) -> Path:
    return RunFolder(Path(config.run_dir)).precision(iteration)


def _scores(model: Sequence[PolicyModel], topology: Topology, triplets: Sequence[Triplet], description: str) -> ByRole:
    pairs = [pair for triplet in triplets for pair in triplet.pairs()]
    roles = list(triplets[0].responses)
    table = np.array(score_pairs(model, topology, pairs, description=description)).reshape(-1, len(roles))
    return {role: table[:, column] for column, role in enumerate(roles)}


def _refuse_nonfinite(log_probs: ByRole, triplets: Sequence[Triplet], iteration: int, where: str, remedy: str) -> None:
    sums = sum(log_probs.values())  # not finite where any of them is not
    ids = [triplet.id for triplet, total in zip(triplets, np.asarray(sums), strict=True) if not np.isfinite(total)]
    if ids:
        raise DivergenceError(
            f"iteration {iteration}, before the first step: log-probs of responses to {len(ids)} of {len(triplets)} "
            f"sampled prompts are not finite {where}; {remedy}. Prompts: {', '.join(ids)}"
        )


def _noise(rescoring: Rescoring, trained: ByRole, formats: str) -> PrecisionNoise:
    """Everything but the drift."""
    triplets, exact = rescoring.triplets, rescoring.exact
    ids = [triplet.id for triplet in triplets]
    tokens = np.array([float(len(triplet.responses[role])) for role in exact for triplet in triplets])
    return PrecisionNoise(
        iteration=rescoring.iteration,
        precision=formats,
        num_prompts=len(triplets),
        num_responses=len(tokens),
        mean_tokens=float(tokens.mean()),
        log_prob=differences(
            np.concatenate([trained[role] for role in exact]), np.concatenate(list(exact.values())), tokens,
            ids * len(exact),
        ),
        current_margin=_margin(rescoring, trained, "annotated", "synthetic"),
        historical_margin=_margin(rescoring, trained, "synthetic", "proto"),
        without_reference=has_reference(rescoring.config.objective.method),
        drift=None,
        drift_share=None,
        no_drift=None,
        seconds=0.0,
    )  # fmt: skip


def _margin(rescoring: Rescoring, trained: ByRole, first: str, second: str) -> MarginNoise | None:
    """The noise of scale * (log pi(first) - log pi(second)); None where a role was not computed or no pair differs.

    A pair of equal responses has no margin in any precision: with many of them, the median would say nothing.
    """
    exact = rescoring.exact
    if not {first, second} <= set(exact):
        return None
    pairs = [(triplet.responses[first], triplet.responses[second]) for triplet in rescoring.triplets]
    apart = [index for index, (one, other) in enumerate(pairs) if list(one) != list(other)]
    if not apart:
        return None
    scale = rescoring.config.objective.margin_scale
    found, expected = (scale * (scores[first] - scores[second])[apart] for scores in (trained, exact))
    tokens = np.array([float(len(pairs[index][0]) + len(pairs[index][1])) for index in apart])
    return margin_noise(found, expected, tokens, [rescoring.triplets[index].id for index in apart])


def _with_drift(noise: PrecisionNoise, rescoring: Rescoring, trained: ByRole) -> PrecisionNoise:
    try:
        drift, of_engine = _drift(rescoring, trained)
    except (_NotComparable, InputError) as error:
        return noise.model_copy(update={"no_drift": str(error)})
    scaled = rescoring.config.objective.margin_scale * drift.mean_absolute
    median = noise.current_margin.median_absolute if noise.current_margin else 0.0
    found: dict[str, Any] = {"drift": drift, "drift_share": share(scaled, median)}
    if rescoring.config.bounds_drift:
        found["engine_drift"] = of_engine
    return noise.model_copy(update=found)


def _drift(rescoring: Rescoring, trained: ByRole) -> tuple[Differences, Differences]:
    """Compares log pi(y') as trained, and in fp32, with that as sampled.

    The engine stores log-probs at temperature 1 over the whole vocabulary, whatever temperature, top-p and top-k it
    samples with (`records.Response.token_log_probs`), which is what training scores: they compare under any decoding.

    Raises:
        _NotComparable: They are of another policy or of other responses.
        InputError: A shard cannot be read.
    """
    if "synthetic" not in trained:
        raise _NotComparable("the method has no sampled answers")
    folder = RunFolder(Path(rescoring.config.run_dir)).synthetic(rescoring.iteration)
    settings = read_json(shard_settings(folder))
    if settings.get("checkpoint_sha256") != sha256_file(rescoring.start / "manifest.json"):
        raise _NotComparable("the answers were sampled from another checkpoint than the one that training starts from")
    wanted = {triplet.id: triplet.responses["synthetic"] for triplet in rescoring.triplets}
    shards = {index // settings["shard_size"] for index in rescoring.indices}
    sampled: dict[str, float] = {}
    for path in (shard_path(folder, shard) for shard in sorted(shards)):
        for answer in read_records(path, Response):
            if answer.id in wanted:
                sampled[answer.id] = _log_prob(answer, wanted[answer.id])
    if set(sampled) != set(wanted):
        raise _NotComparable(f"{folder} does not hold the answers of all sampled prompts")
    tokens = np.array([float(len(response)) for response in wanted.values()])
    expected = np.array([sampled[identifier] for identifier in wanted])
    return (
        differences(trained["synthetic"], expected, tokens, list(wanted)),
        differences(rescoring.exact["synthetic"], expected, tokens, list(wanted)),
    )


def _log_prob(answer: Response, trained_on: Sequence[int]) -> float:
    """The log-prob of what training sees of an answer: the whole, or what a packed row's capacity left of it."""
    if answer.response_ids[: len(trained_on)] != list(trained_on):
        raise _NotComparable(f"the stored answer to prompt {answer.id} is not the one that is trained on")
    return sum(answer.token_log_probs[: len(trained_on)])


def _log_noise(noise: PrecisionNoise) -> None:
    parts = [f"log-probs of {noise.num_responses} responses off by {noise.log_prob.mean_absolute:.3g} nats on average"]
    margin = noise.current_margin
    if margin is not None and margin.noise_share is not None:
        parts.append(f"margins by {100 * margin.noise_share:.2g} % of the median margin")
    if noise.drift is not None:
        parts.append(f"y' by {noise.drift.mean_absolute:.3g} nats from what generation computed")
    if noise.engine_drift is not None:
        parts.append(f"which is {noise.engine_drift.per_token_rms:.3g} nats a token from fp32")
    _log.info("precision: %s", ", ".join(parts))
