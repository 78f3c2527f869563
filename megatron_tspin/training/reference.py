"""Log-probs under the policy that an iteration starts from, for the methods that compare with it.

They are computed and kept in parts, each a fixed range of the triplets, so that an interrupted pass redoes only the
part it was in. A part is scored by itself in rows of its own: its bytes do not depend on where a pass was interrupted.
"""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tspin.errors import ArtifactError
from megatron_tspin.log import get_logger
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.objective.scoring import score_pairs
from megatron_tspin.parallel import Topology, on_first_rank
from megatron_tspin.records import ReferenceLogProbs, read_records
from megatron_tspin.run_folder import reference_facts, reference_parts
from megatron_tspin.storage import read_json, write_json, write_text
from megatron_tspin.training.triplet_source import TripletSource

_PART_TRIPLETS = 1024

_log = get_logger(__name__)


def reference_log_probs(
    path: Path, facts: dict[str, Any], model: Sequence[PolicyModel], topology: Topology, source: TripletSource
) -> list[dict[str, float]]:
    """Returns log pi_t of every response by role, computed once and kept in a file.

    Args:
        path: `reference.jsonl`. `reference.json` beside it, written first, says what it is computed from; a folder
            `reference.parts` holds what is there of an unfinished one.
        facts: Digests of the policy and of the responses.
        model: The policy that the iteration starts from, by virtual stages.
        topology: The layout.
        source: The triplets.

    Returns:
        A mapping from role to log-prob in nats for each triplet, in document order, on every rank.

    Raises:
        ArtifactError: The file was computed from another policy or other responses, or is not of these triplets.
    """
    parts = _Parts(path, source.ids)
    for part in on_first_rank(lambda: parts.pending(facts), topology):
        on_first_rank(partial(parts.write, part, _compute(model, topology, source, part)), topology)
    return on_first_rank(parts.joined, topology)


def _compute(
    model: Sequence[PolicyModel], topology: Topology, source: TripletSource, part: range
) -> list[ReferenceLogProbs]:
    triplets = [source.triplet(index) for index in part]
    roles = list(triplets[0].responses)
    pairs = [pair for triplet in triplets for pair in triplet.pairs()]
    title = f"reference log-probs of triplets {part.start} to {part.stop - 1}"
    scores = score_pairs(model, topology, pairs, description=title)
    rows = [scores[i : i + len(roles)] for i in range(0, len(scores), len(roles))]
    return [
        ReferenceLogProbs(id=triplet.id, log_probs=dict(zip(roles, row, strict=True)))
        for triplet, row in zip(triplets, rows, strict=True)
    ]


class _Parts:
    """The file on the disk, finished or not, as rank 0 sees it."""

    def __init__(self, path: Path, ids: Sequence[str]) -> None:
        self._path = path
        self._facts_path = reference_facts(path)
        self._folder = reference_parts(path)
        self._ids = ids
        starts = range(0, len(ids), _PART_TRIPLETS)
        self._ranges = [range(start, min(start + _PART_TRIPLETS, len(ids))) for start in starts]

    def pending(self, facts: dict[str, Any]) -> list[range]:
        """The parts still to be computed, after what is there was found to be of these facts."""
        if self._path.is_file():
            self._refuse_others(facts)
            return []
        if not self._facts_path.is_file() or read_json(self._facts_path) != facts:
            if self._folder.is_dir():
                _log.warning("%s: computed from another policy or other responses; begun again", self._folder)
                shutil.rmtree(self._folder)
            write_json(self._facts_path, facts)
        pending = [part for part in self._ranges if not self._part_path(part).is_file()]
        if len(pending) < len(self._ranges):
            done = len(self._ranges) - len(pending)
            _log.info("%s: %d of %d parts are already there", self._folder, done, len(self._ranges))
        return pending

    def _refuse_others(self, facts: dict[str, Any]) -> None:
        known = read_json(self._facts_path)
        changed = [
            f"{key} was {known.get(key)}, now {value}" for key, value in facts.items() if known.get(key) != value
        ]
        if changed:
            raise ArtifactError(f"{self._path}: {'; '.join(changed)}; remove the file to compute it again")

    def _part_path(self, part: range) -> Path:
        """Named by its triplets, so that parts of another size are not taken for it."""
        return self._folder / f"triplets_{part.start:08d}_{part.stop:08d}.jsonl"

    def write(self, part: range, records: Sequence[ReferenceLogProbs]) -> None:
        """Keeps a part."""
        write_text(self._part_path(part), "".join(record.line() for record in records))

    def joined(self) -> list[dict[str, float]]:
        """The log-probs of all triplets, once all parts are there; the whole file takes the place of the parts."""
        if not self._path.is_file():
            write_text(self._path, "".join(self._part_path(part).read_text("utf-8") for part in self._ranges))
        if self._folder.is_dir():
            shutil.rmtree(self._folder)
        records = list(read_records(self._path, ReferenceLogProbs))
        if [record.id for record in records] != list(self._ids):
            raise ArtifactError(f"{self._path}: not of this run's examples; remove the file to compute it again")
        return [record.log_probs for record in records]
