"""The triplets of a self-play iteration, by optimizer step."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_tspin.config import Config
from megatron_tspin.data.annotated import read_ids
from megatron_tspin.data.batch_order import GlobalBatchSampler, sample_examples
from megatron_tspin.data.role_documents import PROMPT, open_role_documents
from megatron_tspin.data.steps import steps_per_iteration
from megatron_tspin.log import get_logger
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.objective.batches import Triplet
from megatron_tspin.objective.packing import Packing, Shape, check_capacity, row_packing, truncated, work_model
from megatron_tspin.run_folder import TRAIN, RunFolder, document_stem, examples_path, file_of
from megatron_tspin.storage import sha256_file

_log = get_logger(__name__)


class TripletSource:
    """Reads the role documents of an iteration and hands out global batches.

    Args:
        config: The run.
        iteration: Self-play iteration.
        roles: Roles to read, in order.

    Raises:
        InputError: A triplet does not fit into a packed row; see `--tspin-over-capacity`.
    """

    def __init__(self, config: Config, iteration: int, roles: tuple[str, ...]) -> None:
        folder = RunFolder(Path(config.run_dir))
        stems = _stems(folder, iteration, roles)
        self._documents = open_role_documents(document_stem(folder.data, TRAIN, "prompt"), stems)
        self._sidecars = {role: file_of(stem, "json") for role, stem in stems.items()}
        self._roles = roles
        self.ids: list[str] = read_ids(examples_path(folder.data, TRAIN))
        """The examples' ids, in document order."""
        batch_size = config.training.global_batch_size
        count = self._documents.num_examples
        packing = row_packing(config)
        self._shapes = self._fitting(packing, config.training.over_capacity)
        costs = None
        if config.training.data_order == "balanced":
            work = work_model(read_architecture(Path(config.model.hf_checkpoint)))
            # Of shared prompts whatever the rows: the order of the data must not depend on how rows are laid out.
            costs = [work.training(shape, share_prompts=True) for shape in self._shapes]
        self._key = (config.seed, iteration)
        self._sampler = GlobalBatchSampler(count, batch_size, config.seed, iteration, costs)
        self.num_steps = steps_per_iteration(count, batch_size, config.training.epochs, config.training.train_iters)
        self.reference: Sequence[Mapping[str, float]] | None = None
        """log pi_t by role for each example, where the method has a reference."""

    def digests(self) -> dict[str, str]:
        """Hex SHA-256 of each role's sidecar, which holds those of its tokens."""
        return {role: sha256_file(path) for role, path in self._sidecars.items()}

    def check_unchanged(self) -> None:
        """Demands that the documents are still what was opened; see `Documents.check_unchanged`."""
        self._documents.check_unchanged()

    def global_batch(self, step: int) -> list[Triplet]:
        """The triplets of an optimizer step, counted from 0."""
        return [self.triplet(index) for index in self._sampler.batch(step)]

    def sample(self, count: int) -> list[int]:
        """Indices of up to `count` examples, drawn at random for this iteration, in document order."""
        return sample_examples(self._documents.num_examples, count, *self._key)

    def triplet(self, index: int) -> Triplet:
        """Example `index` with its responses."""
        return Triplet(
            id=self.ids[index],
            prompt=self._documents.prompt(index),
            responses={
                role: self._documents.response(role, index)[:length]
                for role, length in zip(self._roles, self._shapes[index].responses, strict=True)
            },
            reference=self.reference[index] if self.reference is not None else None,
        )

    def _fitting(self, packing: Packing | None, over_capacity: str) -> list[Shape]:
        """The lengths of every triplet, cut to the capacity of a packed row where that was asked for.

        Raises:
            InputError: A triplet is longer than a packed row; names its prompt.
        """
        lengths = zip(*(self._documents.lengths(role).tolist() for role in self._roles), strict=True)
        prompts = self._documents.lengths(PROMPT).tolist()
        shapes = [Shape(prompt, responses) for prompt, responses in zip(prompts, lengths, strict=True)]
        if packing is None:
            return shapes
        if over_capacity == "refuse":
            check_capacity(shapes, self.ids, packing)
            return shapes
        cut = [truncated(shape, packing, identifier) for shape, identifier in zip(shapes, self.ids, strict=True)]
        changed = [identifier for identifier, old, new in zip(self.ids, shapes, cut, strict=True) if old != new]
        if changed:
            _log.warning(
                "responses of %d of %d triplets were cut to fit into rows of %d tokens: prompts %s",
                len(changed), len(shapes), packing.capacity, ", ".join(changed),
            )  # fmt: skip
        return cut


def _stems(folder: RunFolder, iteration: int, roles: tuple[str, ...]) -> dict[str, Path]:
    where = {"annotated": folder.data, "proto": folder.data, "synthetic": folder.iteration(iteration)}
    return {role: document_stem(where[role], TRAIN, role) for role in roles}
