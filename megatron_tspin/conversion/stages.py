"""HF checkpoints into the run and out of it. Checkpoints made here are fp32, which loses nothing of the source."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_tspin.checkpoint.hf_weights import export_hf, load_hf
from megatron_tspin.checkpoint.hf_writer import SHARD_BYTES
from megatron_tspin.checkpoint.policies import load_policy, policy_checkpoint
from megatron_tspin.checkpoint.store import save_checkpoint
from megatron_tspin.checkpoint.verification import verify_together
from megatron_tspin.checkpoint.weight_files import source_digest
from megatron_tspin.config import Config, ParallelSection, TrainingSection
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.conversion.loading import check_loads
from megatron_tspin.conversion.parity import LOG_PROB_BOUND, Sentence, check_parity, read_sentences
from megatron_tspin.data.annotated import read_examples
from megatron_tspin.data.encoding import EncodedExamples
from megatron_tspin.data.indexed import open_documents
from megatron_tspin.data.tokenization import load_run_tokenizer
from megatron_tspin.data.tokenizer_export import COMPARED, check_tokenizer, write_endings, write_tokenizer
from megatron_tspin.errors import ArtifactError
from megatron_tspin.log import get_logger
from megatron_tspin.models.build import build_policy
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.models.hf_reading import check_reading
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.parallel import Topology, distributed, on_first_rank
from megatron_tspin.run_folder import TRAIN, VERIFICATION, RunFolder, document_stem, examples_path
from megatron_tspin.storage import refuse_existing_folder, write_json

_log = get_logger(__name__)


@dataclass(frozen=True)
class _Gate:
    """What a conversion has to pass."""

    sentences: list[Sentence]
    bound: float
    card: Path
    """Where to write what was found."""


def convert_run(config: Config) -> None:
    """Makes the run's initial checkpoint, unless one of the same HF files is there and whole.

    Raises:
        InputError: The HF checkpoint cannot be used.
        ParityError: It computes something else here than in transformers.
    """
    source, target = Path(config.model.hf_checkpoint), RunFolder(Path(config.run_dir)).initial_checkpoint
    layout, verify = config.parallel.whole_stages(), config.model.verify_conversion
    with distributed(layout, config.seed) as topology:
        digest = on_first_rank(lambda: source_digest(source), topology)
        card = RunFolder(Path(config.run_dir)).verification
        if _is_of(target, digest, topology) and (not verify or on_first_rank(card.is_file, topology)):
            _log.info("%s is there already", target)
            return
        sentences = read_sentences(source, None, load_run_tokenizer(config)) if verify else []
        _convert(source, target, layout, topology, digest, _Gate(sentences, LOG_PROB_BOUND, card) if verify else None)


def convert_checkpoint(
    hf_checkpoint: Path, save: Path, parallel: ParallelSection, verify: bool, verify_data: Path | None, bound: float
) -> None:
    """Converts an HF checkpoint, and on request compares what the two models compute.

    Args:
        hf_checkpoint: The HF folder.
        save: The checkpoint folder to write.
        parallel: The layout; the checkpoint loads under any other too.
        verify: Compare with transformers, layer by layer and on sequence log-probs, before anything is written.
        verify_data: JSONL with `prompt` and `response` to compare on; None takes built-in sentences.
        bound: Largest relative difference of a sequence log-prob.

    Raises:
        InputError: A folder or a file cannot be used.
        ParityError: The difference is larger than `bound`.
    """
    sentences = read_sentences(hf_checkpoint, verify_data) if verify else []
    with distributed(parallel) as topology:
        on_first_rank(lambda: refuse_existing_folder(save), topology)
        digest = on_first_rank(lambda: source_digest(hf_checkpoint), topology)
        gate = _Gate(sentences, bound, save / VERIFICATION) if verify else None
        _convert(hf_checkpoint, save, parallel, topology, digest, gate)


def export_run(config: Config) -> None:
    """Exports the policy after the last self-play iteration, in the dtypes of the run's HF checkpoint."""
    folder = RunFolder(Path(config.run_dir))
    layout = config.parallel.whole_stages()
    with distributed(layout, config.seed) as topology:
        found = policy_checkpoint(folder, config.self_play.iterations, topology)

        def complete(target: Path) -> None:
            write_tokenizer(config, target)
            write_endings(load_run_tokenizer(config).endings, target)
            _check_tokenizer(config, target, folder.data)
            check_loads(target)

        _export(found, Path(config.model.hf_checkpoint), folder.export, layout, topology, complete)


def export_checkpoint(
    load: Path,
    hf_checkpoint: Path,
    save: Path,
    parallel: ParallelSection,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Exports any checkpoint of this project.

    Args:
        load: The checkpoint.
        hf_checkpoint: The HF folder it came from; gives config.json, tokenizer and each tensor's dtype.
        save: The HF folder to write.
        parallel: The layout.
        dtype: Of all tensors instead.
        shard_bytes: Most bytes of a file of weights.
    """
    with distributed(parallel) as topology:
        on_first_rank(lambda: refuse_existing_folder(save), topology)
        _export(load, hf_checkpoint, save, parallel, topology, check_loads, dtype, shard_bytes)


def _convert(
    source: Path,
    target: Path,
    parallel: ParallelSection,
    topology: Topology,
    digest: str,
    gate: _Gate | None,
) -> None:
    architecture = read_architecture(source)
    on_first_rank(lambda: check_reading(architecture), topology)
    model: PolicyModel = build_policy(architecture, parallel, TrainingSection(), PrecisionSection(), topology)
    load_hf(model, topology)
    model.eval()  # in training, megatron-core refuses experts at TP without a split sequence
    card = None
    if gate is not None:
        found = check_parity(model, topology, source, gate.sentences, gate.bound)
        card = found.model_copy(update={"source": str(source), "source_digest": digest})
    save_checkpoint(target, model, topology, state={"hf_checkpoint": str(source), "hf_digest": digest})
    if gate is not None and card is not None:
        on_first_rank(lambda: write_json(gate.card, card.model_dump()), topology)
    if topology.speaks:
        _log.info("converted %s to %s", source, target)


def _check_tokenizer(config: Config, target: Path, data: Path) -> None:
    """On the run's own first examples; where it has none, it has trained on nothing either."""
    if not examples_path(data, TRAIN).is_file():
        return
    examples = read_examples(examples_path(data, TRAIN))[:COMPARED]
    documents = [open_documents(document_stem(data, TRAIN, key)) for key in ("prompt", "annotated")]
    prompts, responses = ([document[index] for index in range(len(examples))] for document in documents)
    check_tokenizer(config, target, EncodedExamples(examples, prompts, responses))


def _export(
    load: Path,
    source: Path,
    target: Path,
    parallel: ParallelSection,
    topology: Topology,
    complete: Callable[[Path], None],
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
) -> None:
    model = load_policy(read_architecture(source), parallel, TrainingSection(), PrecisionSection(), topology, load)
    export_hf(model, topology, source, target, dtype, shard_bytes or SHARD_BYTES, complete)
    if topology.speaks:
        _log.info("exported %s to %s", load, target)


def _is_of(checkpoint: Path, digest: str, topology: Topology) -> bool:
    """Whether the checkpoint is whole and was made from the source with this digest; all ranks call it."""
    if not on_first_rank(checkpoint.is_dir, topology):
        return False
    try:
        return bool(verify_together(checkpoint, topology)["state"].get("hf_digest") == digest)
    except ArtifactError as error:
        if topology.speaks:
            _log.warning("%s is made again: %s", checkpoint, error)
        return False
