"""What ranks tell of their nodes, and what is wrong with it."""

import hashlib
import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import megatron_tspin
from megatron_tspin.provenance import versions
from megatron_tspin.storage import sha256_file

_SAME_EVERYWHERE = re.compile(r"^(NCCL_|GLOO_|TORCH_NCCL_|NVTE_|CUDA_DEVICE_MAX_CONNECTIONS$|PYTORCH_CUDA_ALLOC_CONF$)")
_OF_THE_NODE = re.compile(r"IFNAME|HCA|TOPO_FILE")  # devices may have other names on another node
_HARMFUL = {
    ("NCCL_ASYNC_ERROR_HANDLING", "0"): "a rank that fails leaves the others waiting",
    ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"): "a rank that fails leaves the others waiting",
    ("TORCH_NCCL_BLOCKING_WAIT", "1"): "every collective blocks its host thread",
    ("CUDA_LAUNCH_BLOCKING", "1"): "every kernel is waited for",
    ("NCCL_P2P_DISABLE", "1"): "GPUs of a node talk through host memory",
    ("NCCL_IB_DISABLE", "1"): "nodes talk over TCP",
}
_CLOCK_SECONDS = 5.0
_FREE_SHARE = 0.9


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    node: str
    what: str
    remedy: str
    fatal: bool = True

    def line(self) -> str:
        """For people."""
        return f"{'FAIL' if self.fatal else 'warn'}  {self.node}: {self.what}; {self.remedy}"


@dataclass(frozen=True)
class Gpu:
    """A rank's device."""

    name: str
    total: int
    """Bytes."""
    free: int


@dataclass(frozen=True)
class Facts:
    """What a rank tells of its node."""

    rank: int
    host: str
    versions: dict[str, str]
    code: str
    """Digest of the package's source."""
    config: str
    """Digest of the run's config file."""
    clock: float
    """Seconds since the epoch, right after all ranks have met."""
    settings: dict[str, str] = field(default_factory=dict)
    gpu: Gpu | None = None


def own_facts(rank: int, config: Path, clock: float, gpu: Gpu | None) -> Facts:
    """Those of this process."""
    settings = {name: value for name, value in sorted(os.environ.items()) if _SAME_EVERYWHERE.match(name)}
    return Facts(rank, socket.gethostname(), versions(), code_digest(), sha256_file(config), clock, settings, gpu)


def code_digest() -> str:
    """Hex SHA-256 of the package as this node sees it."""
    root = Path(megatron_tspin.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def differences(all_facts: Sequence[Facts]) -> Iterator[Finding]:
    """What is not the same on all nodes, once a node, and what no node should have.

    Args:
        all_facts: Of all ranks, in order.
    """
    first = all_facts[0]
    for facts in {each.host: each for each in reversed(all_facts)}.values():
        yield from _against(first, facts)
        for (name, value), harm in _HARMFUL.items():
            if os.environ.get(name) == value and facts is first:
                yield Finding(facts.host, f"{name} = {value}: {harm}", "unset it", fatal=False)


def _against(first: Facts, facts: Facts) -> Iterator[Finding]:
    for name in sorted(first.versions.keys() | facts.versions.keys()):
        ours, theirs = facts.versions.get(name, "absent"), first.versions.get(name, "absent")
        if ours != theirs:
            yield Finding(facts.host, f"{name} {ours}, on {first.host} {theirs}", "install the same on all nodes")
    if facts.code != first.code:
        yield Finding(facts.host, f"other code of this project than {first.host}", "install the same on all nodes")
    if facts.config != first.config:
        yield Finding(
            facts.host, f"another run.yaml than {first.host}", "wait until the file system shows it, or mount the same"
        )
    if abs(facts.clock - first.clock) > _CLOCK_SECONDS:
        skew = facts.clock - first.clock
        yield Finding(
            facts.host, f"its clock is {skew:+.0f} s from {first.host}'s", "start its time service", fatal=False
        )
    for name in sorted(first.settings.keys() | facts.settings.keys()):
        ours, theirs = facts.settings.get(name, "absent"), first.settings.get(name, "absent")
        if ours != theirs and not _OF_THE_NODE.search(name):
            yield Finding(facts.host, f"{name} = {ours}, on {first.host} {theirs}", "set the same on all nodes")


def gpu_findings(all_facts: Sequence[Facts], needed: int) -> Iterator[Finding]:
    """What is wrong with the ranks' GPUs.

    Args:
        all_facts: Of all ranks, in order.
        needed: Bytes that a rank needs at the least, see `least_bytes_of_a_rank`.
    """
    first = all_facts[0]
    for facts in all_facts:
        if (facts.gpu is None) != (first.gpu is None):
            who = first.host if facts.gpu is None else facts.host
            yield Finding(facts.host, f"rank {facts.rank}: only {who} has a GPU", "ask for nodes of one kind")
        if facts.gpu is None or first.gpu is None:
            continue
        where = f"rank {facts.rank}, {facts.gpu.name}"
        if facts.gpu.name != first.gpu.name:
            yield Finding(
                facts.host, f"{where}: on {first.host} {first.gpu.name}", "ask for nodes of one kind", fatal=False
            )
        if facts.gpu.free < _FREE_SHARE * facts.gpu.total:
            used = _gib(facts.gpu.total - facts.gpu.free)
            yield Finding(facts.host, f"{where}: {used} are in use by another process", "end it, or drain the node")
        elif facts.gpu.total < needed:
            yield Finding(
                facts.host,
                f"{where}: weights, gradients and optimizer need {_gib(needed)} of {_gib(facts.gpu.total)}",
                "raise TP or PP, or use the distributed optimizer",
            )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
