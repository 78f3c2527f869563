"""What every rank of `tspin doctor` does."""

import datetime
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_tspin.config import Config
from megatron_tspin.doctor.findings import Facts, Finding, Gpu, differences, gpu_findings, own_facts
from megatron_tspin.doctor.shared_folder import held_lock, lock_findings, missing_probes, remove_probes, write_probe
from megatron_tspin.errors import InputError
from megatron_tspin.heartbeat import beat
from megatron_tspin.log import get_logger
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.models.sizes import num_expert_parameters, num_parameters
from megatron_tspin.parallel import Topology, distributed
from megatron_tspin.platform import device, has_cuda
from megatron_tspin.run_folder import RunFolder

_PATIENCE = datetime.timedelta(seconds=120)
_MESSAGE_BYTES = 64 * 2**20
_ROUNDS = 5
_SLOW_SHARE = 0.5
_SQUARE = 1024

_log = get_logger(__name__)


def examine(config: Config) -> None:
    """Examines nodes, network and GPUs; every line of what was found is logged by rank 0.

    Raises:
        InputError: Something would make the run fail; says all of it, with the remedies.
    """
    folder = RunFolder(Path(config.run_dir))
    with distributed(config.largest_layout(), config.seed, patience=_PATIENCE) as topology:
        beat("doctor")
        facts = _gathered(own_facts(topology.rank, folder.config, _clock(), _gpu()), topology)
        found = [*differences(facts), *gpu_findings(facts, least_bytes_of_a_rank(config))]
        found += _of_all(_folder_findings(folder.doctor, facts, topology), topology)
        found += _of_all(_arithmetic_findings(topology), topology)
        rates = _rates(topology)
        found += slow_nodes(_gathered((socket.gethostname(), rates), topology))
        if topology.speaks:
            _log.info("%d ranks on %s", len(facts), ", ".join(dict.fromkeys(each.host for each in facts)))
            for name, rate in rates.items():
                _log.info("%s: %.2f GB/s", name, rate)
            for finding in found:
                _log.warning("%s", finding.line())
        fatal = [finding.line() for finding in found if finding.fatal]
        if fatal:
            raise InputError("\n".join(fatal))
        if topology.speaks:
            _log.info("doctor: nothing stands in the way")


def least_bytes_of_a_rank(config: Config) -> int:
    """Bytes of weights, gradients and optimizer of an average rank that trains; activations come on top."""
    architecture = read_architecture(Path(config.model.hf_checkpoint))
    layout = config.parallel
    experts = num_expert_parameters(architecture)
    parameters = num_parameters(architecture) - experts + experts // layout.expert_model_parallel_size
    shared = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    moments = 2 if config.optimizer.optimizer == "adam" else 1
    weight, master = (2, 4) if config.precision.bf16 else (4, 0)
    optimizer = master + 4 * moments
    if layout.use_distributed_optimizer:
        optimizer = -(-optimizer // layout.data_parallel_size)
    return parameters * (weight + 4 + optimizer) // shared


def _gathered(mine: Any, topology: Topology) -> list[Any]:
    found: list[Any] = [None] * topology.world_size
    dist.all_gather_object(found, mine)
    return found


def _of_all(mine: Iterable[Finding], topology: Topology) -> list[Finding]:
    """What any rank found, each line once."""
    return list(dict.fromkeys(finding for share in _gathered(list(mine), topology) for finding in share))


def _clock() -> float:
    """The time on this node, at one moment for all."""
    dist.barrier()
    return time.time()


def _gpu() -> Gpu | None:
    if not has_cuda():
        return None
    free, total = torch.cuda.mem_get_info()
    return Gpu(torch.cuda.get_device_name(), total, free)


def _folder_findings(folder: Path, facts: Sequence[Facts], topology: Topology) -> list[Finding]:
    """What this node sees of the others in the run's folder."""
    hosts = list(dict.fromkeys(each.host for each in facts))
    found = write_probe(folder)
    dist.barrier()
    found += missing_probes(folder, hosts)
    dist.barrier()
    lock = folder / "probe.lock"
    if topology.rank == 0 and not found:
        with held_lock(lock):
            dist.barrier()
            dist.barrier()
    else:
        dist.barrier()
        if not found and socket.gethostname() != hosts[0]:
            found += lock_findings(lock, hosts[0])
        dist.barrier()
    if topology.rank == 0:
        remove_probes(folder)
    return found


def _arithmetic_findings(topology: Topology) -> Iterator[Finding]:
    """A sick GPU computes something else than it did a moment ago, or nothing that is finite."""
    matrix = torch.linspace(-1, 1, _SQUARE * _SQUARE, device=device()).view(_SQUARE, _SQUARE)
    first, second = matrix @ matrix, matrix @ matrix
    if not torch.equal(first, second) or not bool(first.isfinite().all()):
        yield Finding(
            socket.gethostname(), f"rank {topology.rank}: a product of matrices is not what it was", "drain the node"
        )


def _rates(topology: Topology) -> dict[str, float]:
    """Bytes that this rank sends a second, in GB, over the run's own groups."""
    groups = {"TP": topology.tp_group, "PP": topology.pp_group, "DP x CP": topology.dp_cp_group}
    message = torch.ones(_MESSAGE_BYTES // 4, device=device())
    found = {}
    for name, group in groups.items():
        if group.size() > 1:
            size = group.size()
            sent = 2 * (size - 1) / size * _MESSAGE_BYTES  # of a ring
            found[f"all-reduce over {name} ({size} ranks)"] = sent / _seconds(message, group) / 1e9
    if topology.pp_size > 1:
        found["point to point over PP"] = _MESSAGE_BYTES / _seconds_to_neighbour(message, topology) / 1e9
    return found


def _seconds_to_neighbour(message: torch.Tensor, topology: Topology) -> float:
    """From each stage to the next, as a pipeline's activations go, all at once in a ring."""
    after, before = ((topology.pp_rank + step) % topology.pp_size for step in (1, -1))
    received, measured = torch.empty_like(message), []
    for _ in range(_ROUNDS + 1):
        beat()
        dist.barrier(group=topology.pp_group)
        started = time.perf_counter()
        pair = [
            dist.P2POp(dist.isend, message, group=topology.pp_group, group_peer=after),
            dist.P2POp(dist.irecv, received, group=topology.pp_group, group_peer=before),
        ]
        for each in dist.batch_isend_irecv(pair):
            each.wait()
        if has_cuda():
            torch.cuda.synchronize()
        measured.append(time.perf_counter() - started)
    return median(measured[1:])


def _seconds(message: torch.Tensor, group: dist.ProcessGroup) -> float:
    """Of the median round, after one that opens the connections."""
    measured = []
    for _ in range(_ROUNDS + 1):
        beat()
        dist.barrier(group=group)
        started = time.perf_counter()
        dist.all_reduce(message, group=group)
        if has_cuda():
            torch.cuda.synchronize()
        measured.append(time.perf_counter() - started)
        message.fill_(1.0)
    return median(measured[1:])


def slow_nodes(rates: Sequence[tuple[str, dict[str, float]]]) -> list[Finding]:
    """Nodes whose links are much slower than most.

    Args:
        rates: Host and rates of every rank.
    """
    found = []
    for name in rates[0][1]:
        usual = median(each[name] for _, each in rates)
        slow = dict.fromkeys(host for host, each in rates if each[name] < _SLOW_SHARE * usual)
        for host in slow:
            found.append(
                Finding(host, f"{name} is slower than half of the median {usual:.2f} GB/s", "look at its link", False)
            )
    return found
