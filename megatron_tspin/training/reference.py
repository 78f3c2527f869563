"""Log-probs under the policy that an iteration starts from, for the methods that compare with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tspin.errors import ArtifactError
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.objective.scoring import score_pairs
from megatron_tspin.parallel import Topology
from megatron_tspin.records import ReferenceLogProbs, read_records
from megatron_tspin.run_folder import reference_facts
from megatron_tspin.storage import read_json, write_json, write_text
from megatron_tspin.training.triplet_source import TripletSource


def reference_log_probs(
    path: Path, facts: dict[str, Any], model: Sequence[PolicyModel], topology: Topology, source: TripletSource
) -> list[dict[str, float]]:
    """Returns log pi_t of every response by role, computed once and kept in a file.

    Args:
        path: `reference.jsonl`; `reference.json` beside it says what it was computed from.
        facts: Digests of the policy and of the responses.
        model: The policy that the iteration starts from, by virtual stages.
        topology: The layout.
        source: The triplets.

    Raises:
        ArtifactError: The file was computed from another policy or other responses.
    """
    facts_path = reference_facts(path)
    missing = not path.is_file()
    dist.barrier()  # every rank has looked before any rank writes
    if missing:
        records = _compute(model, topology, source)
        if topology.speaks:
            write_json(facts_path, facts)
            write_text(path, "".join(record.line() for record in records))
        dist.barrier()
    known = read_json(facts_path)
    if known != facts:
        changed = [
            f"{key} was {known.get(key)}, now {value}" for key, value in facts.items() if known.get(key) != value
        ]
        raise ArtifactError(f"{path}: {'; '.join(changed)}; remove the file to compute it again")
    return [record.log_probs for record in read_records(path, ReferenceLogProbs)]


def _compute(model: Sequence[PolicyModel], topology: Topology, source: TripletSource) -> list[ReferenceLogProbs]:
    triplets = source.all()
    roles = list(triplets[0].responses)
    pairs = [pair for triplet in triplets for pair in triplet.pairs()]
    scores = score_pairs(model, topology, pairs, description="reference log-probs")
    rows = [scores[i : i + len(roles)] for i in range(0, len(scores), len(roles))]
    return [
        ReferenceLogProbs(id=triplet.id, log_probs=dict(zip(roles, row, strict=True)))
        for triplet, row in zip(triplets, rows, strict=True)
    ]
