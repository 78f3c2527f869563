"""The stages that run the policy in the training layout: train an iteration, score given responses."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tspin.checkpoint.manifest import read_manifest
from megatron_tspin.checkpoint.policies import load_policy, newest_whole, policy_checkpoint
from megatron_tspin.checkpoint.store import load_checkpoint, load_masters, save_checkpoint
from megatron_tspin.config import Config
from megatron_tspin.errors import ArtifactError, StoppedError
from megatron_tspin.log import get_logger
from megatron_tspin.models.build import build_chunks
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.models.packed_attention import choose_backend
from megatron_tspin.models.policy import num_parameters
from megatron_tspin.objective.packing import row_packing
from megatron_tspin.objective.roles import computed_roles, has_reference
from megatron_tspin.objective.scoring import score_pairs
from megatron_tspin.parallel import distributed, on_first_rank, refuse_stale_facts, wait_for_all_ranks
from megatron_tspin.platform import device
from megatron_tspin.precision import describe, uses_transformer_engine
from megatron_tspin.records import PrecisionNoise, ScoredResponse
from megatron_tspin.run_folder import RunFolder, step_folder, step_folders, step_leftovers, step_of
from megatron_tspin.step_metrics import StepMetrics
from megatron_tspin.stop_request import heeded, stop_requested
from megatron_tspin.storage import refuse_existing, sha256_file, write_text
from megatron_tspin.training.loop import Trainer, build_trainer, iteration_beta
from megatron_tspin.training.metrics import MetricsWriter
from megatron_tspin.training.precision_noise import noise_scalars
from megatron_tspin.training.reference import reference_log_probs
from megatron_tspin.training.rescoring import measure_noise, refuse_drift, score_in_fp32
from megatron_tspin.training.scoring_input import read_scoring_input
from megatron_tspin.training.triplet_source import TripletSource

_log = get_logger(__name__)


def train_run(config: Config, iteration: int, load: Path | None, save: Path | None) -> None:
    """Trains one self-play iteration, or what is left of it.

    Args:
        config: The run.
        iteration: From 0.
        load: Checkpoint of the policy to start from. Default: the run's, after `iteration` iterations.
        save: Folder for this iteration's checkpoints. Default: the run's.
    """
    folder = RunFolder(Path(config.run_dir))
    checkpoints = save or folder.checkpoints(iteration)
    architecture = read_architecture(Path(config.model.hf_checkpoint))
    architecture.check_layout(config.parallel, training=True)
    with distributed(config.parallel, config.seed, config.precision.tokens_multiple) as topology:
        roles = computed_roles(config.objective.method, iteration_beta(config, iteration))
        source = TripletSource(config, iteration, roles)
        documents = source.digests()
        refuse_stale_facts(f"iteration {iteration}, the documents to train on", documents, topology)
        resumed = newest_whole(checkpoints, topology)
        start = load or policy_checkpoint(folder, iteration, topology)
        model = build_chunks(architecture, config.parallel, config.training, config.precision, topology)
        trainer = build_trainer(config, iteration, topology, model, source.num_steps)
        _load_start(trainer, start)
        facts = {"checkpoint_sha256": sha256_file(start / "manifest.json"), "documents": documents}
        if resumed is not None:
            on_first_rank(lambda: _refuse_other_beginning(resumed, facts), topology)
        _log.info("policy from %s, %d parameters on this rank", start, sum(map(num_parameters, model)))
        _log.info("precision: %s", describe(config.precision))
        _log_rows(config)
        rescoring = score_in_fp32(trainer, source, start)
        noise = measure_noise(rescoring, model) if rescoring is not None else None
        refuse_drift(config, iteration, topology)
        if has_reference(config.objective.method):
            source.reference = reference_log_probs(folder.reference(iteration), facts, model, topology, source)
        if resumed is not None:
            trainer.done = _resume(trainer, resumed)
        _train(trainer, source, checkpoints, folder, noise, facts)


def _load_start(trainer: Trainer, start: Path) -> None:
    """Loads the policy that the iteration starts from, and its fp32 masters where it trains in bf16."""
    if trainer.config.precision.bf16:
        load_masters(start, trainer.chunks, trainer.topology, trainer.optimizer)
    else:
        load_checkpoint(start, trainer.chunks, trainer.topology)


def _log_rows(config: Config) -> None:
    packing = row_packing(config)
    if packing is None:
        _log.info("rows: padded, one a response")
        return
    backend = choose_backend(
        config.training.packed_attention, device(), uses_transformer_engine(config.precision), packing.share_prompts
    )
    shared = "shared" if packing.share_prompts else "not shared"
    _log.info("rows: packed up to %d tokens, prompts %s, attention by %s", packing.capacity, shared, backend)


def _resume(trainer: Trainer, checkpoint: Path) -> int:
    """Continues from a checkpoint inside the iteration; returns the steps it holds."""
    step = step_of(checkpoint)
    if step < trainer.num_steps:
        state = load_checkpoint(checkpoint, trainer.chunks, trainer.topology, trainer.optimizer)
        step = int(state["step"])
    _log.info("continuing after step %d of %d from %s", step, trainer.num_steps, checkpoint)
    return step


def _refuse_other_beginning(checkpoint: Path, facts: dict[str, Any]) -> None:
    """An iteration is continued towards what it began with, or not at all."""
    before = read_manifest(checkpoint)["state"].get("began_with")
    if before != facts:
        raise ArtifactError(
            f"{checkpoint}: was trained from another policy, or on other documents, than this iteration begins with "
            f"now ({before} then, {facts} now); remove {checkpoint.parent} to train the iteration again"
        )


def _train(
    trainer: Trainer,
    source: TripletSource,
    checkpoints: Path,
    folder: RunFolder,
    noise: PrecisionNoise | None,
    began_with: dict[str, Any],
) -> None:
    wait_for_all_ranks()  # reading takes one rank longer than another; what follows waits no longer than a step does
    topology, training = trainer.topology, trainer.config.training
    interval = training.save_interval or trainer.num_steps
    writer = None
    if topology.speaks:
        events = folder.tensorboard(trainer.iteration) if training.tensorboard else None
        writer = MetricsWriter(folder.metrics(trainer.iteration), trainer.done, events)
        writer.write_start(noise_scalars(noise) if noise is not None else {})

    def after_step(metrics: StepMetrics) -> None:
        if writer is not None:
            writer.write(metrics)
        if trainer.stopping or trainer.done == trainer.num_steps or trainer.done % interval == 0:
            on_first_rank(source.check_unchanged, topology)
            save_step(trainer, checkpoints, began_with)

    try:
        with heeded():
            trainer.train(source.global_batch, after_step)
    finally:
        if writer is not None:
            writer.close()
    if trainer.done < trainer.num_steps:
        wait_for_all_ranks()  # whoever ends first lets torchrun end the others
        raise StoppedError(
            f"stopped as {stop_requested() or 'another rank was'} asked: iteration {trainer.iteration} is saved after "
            f"step {trainer.done} of {trainer.num_steps}"
        )


def save_step(trainer: Trainer, checkpoints: Path, began_with: dict[str, Any]) -> None:
    """Saves the policy; inside the iteration the optimizer too, which starts afresh in the next iteration.

    The iteration's last checkpoint has the fp32 master weights as its weights, for the next one to start from.
    Older checkpoints of the iteration go once a newer one is whole: all of them at its end, and before that those that
    `training.keep_checkpoints` no longer keeps.
    """
    finished = trainer.done == trainer.num_steps
    save_checkpoint(
        step_folder(checkpoints, trainer.done),
        trainer.whole_policy(),
        trainer.topology,
        optimizer=None if finished else trainer.optimizer,
        masters=trainer.optimizer if finished and trainer.config.precision.bf16 else None,
        state={
            "step": trainer.done,
            "iteration": trainer.iteration,
            "seed": trainer.config.seed,
            "began_with": began_with,
        },
    )
    if trainer.topology.speaks:
        keep_latest(checkpoints, trainer.done, 1 if finished else trainer.config.training.keep_checkpoints)


def keep_latest(checkpoints: Path, step: int, count: int) -> None:
    """Removes an iteration's checkpoints but for the `count` latest up to the one after `step`; 0 keeps all.

    Those of later steps are not whole, or the iteration would have been continued from them.
    """
    if count == 0:
        return
    found = step_folders(checkpoints)
    latest = [path for path in found if path <= step_folder(checkpoints, step)][-count:]
    for path in (*found, *step_leftovers(checkpoints)):
        if path not in latest:
            shutil.rmtree(path)


def score_file(config: Config, load: Path, data: Path, output: Path, overwrite: bool) -> None:
    """Writes the sequence log-prob of each response of a JSONL file.

    Args:
        config: Template, tokenizer and layout.
        load: The checkpoint to score under.
        data: Lines with `prompt` and `response` (text, closed with EOS), or with `prompt_ids` and `response_ids`.
        output: `ScoredResponse` lines, in the order of `data`.
        overwrite: Replace a file that is there.

    Raises:
        InputError: A file or a line of it cannot be used, or `output` is there and not to be replaced.
    """
    architecture = read_architecture(Path(config.model.hf_checkpoint))
    architecture.check_layout(config.parallel, training=True)
    ids, pairs = read_scoring_input(config, data, architecture.vocab_size)
    layout = config.parallel.whole_stages()
    with distributed(layout, config.seed, config.precision.tokens_multiple) as topology:
        on_first_rank(lambda: refuse_existing(output, overwrite), topology)
        model = load_policy(architecture, layout, config.training, config.precision, topology, load)
        scores = score_pairs(model, topology, pairs, description="score")
        if topology.speaks:
            write_text(output, "".join(record.line() for record in _scored(ids, pairs, scores)))


def _scored(
    ids: Sequence[str], pairs: Sequence[tuple[Sequence[int], Sequence[int]]], scores: Sequence[float]
) -> list[ScoredResponse]:
    return [
        ScoredResponse(id=identifier, log_prob=score, num_tokens=len(response))
        for identifier, (_, response), score in zip(ids, pairs, scores, strict=True)
    ]
