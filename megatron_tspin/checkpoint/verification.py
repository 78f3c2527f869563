"""Checkpoints checked by all ranks together: sizes whenever one is loaded, digests once in the life of the processes.

A stage is a process group of its own, so each stage reads what it loads once more than it must: enough to find a
flipped bit before anything is computed from it. Rank 0 looks at sizes; the ranks share the files to hash.
"""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tspin.checkpoint.manifest import check_checkpoint, digest_problems
from megatron_tspin.errors import ArtifactError
from megatron_tspin.heartbeat import busy
from megatron_tspin.parallel import Topology, on_first_rank

_hashed: dict[Path, tuple[str, int]] = {}
"""Files that this process found right: their digest, and when they were last written (nanoseconds)."""


@busy("checking a checkpoint")
def verify_together(folder: Path, topology: Topology) -> dict[str, Any]:
    """Checks a checkpoint, all ranks together, and returns its manifest.

    Raises:
        ArtifactError: On every rank. Names every file that is missing or not the one that was saved, with the promised
            and the actual value.
    """
    manifest = on_first_rank(lambda: check_checkpoint(folder), topology)
    names = sorted(manifest["files"])[topology.rank :: topology.world_size]
    problems = _problems(folder, {name: manifest["files"][name] for name in names})
    shares: list[list[str]] = [[] for _ in range(topology.world_size)]
    dist.all_gather_object(shares, problems)
    found = sorted({problem for share in shares for problem in share})
    if found:
        raise ArtifactError("\n".join(found))
    return manifest


def _problems(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """Of this rank's share of the files, whose sizes rank 0 has looked at."""
    try:
        known = {name: (facts["sha256"], (folder / name).stat().st_mtime_ns) for name, facts in files.items()}
        fresh = {name: files[name] for name in files if _hashed.get(folder / name) != known[name]}
        problems = digest_problems(folder, fresh)
    except OSError as error:
        return [f"{folder}: a file that rank 0 sees cannot be read by another rank: {error}"]
    if not problems:
        _hashed.update({folder / name: known[name] for name in fresh})
    return problems
