"""Which rank a process is, whatever started it: srun and mpirun say it in their own variables, torch reads torchrun's.

Names: srun's manual (OUTPUT ENVIRONMENT VARIABLES), Open MPI's FAQ on OMPI_COMM_WORLD_*, MPICH's Hydra (PMI_*).
"""

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping

_FIRST_PORT, _PORTS = 20000, 10000
"""Below those that systems give away by themselves (from 32768 on)."""
_MPI = (
    {
        "RANK": "OMPI_COMM_WORLD_RANK",
        "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
        "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
        "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
    },
    {
        "RANK": "PMI_RANK",
        "WORLD_SIZE": "PMI_SIZE",
        "LOCAL_RANK": "MPI_LOCALRANKID",
        "LOCAL_WORLD_SIZE": "MPI_LOCALNRANKS",
    },
)
"""Open MPI's and Hydra's (MPICH, Intel MPI)."""


def adopt_launcher(environment: MutableMapping[str, str]) -> None:
    """Sets torchrun's variables where srun or mpirun has started several processes and torchrun none.

    srun's ranks meet on the first node of their step, mpirun's on their host; on several hosts MASTER_ADDR and
    MASTER_PORT are left to the user. What of the two is set stays.
    """
    if "RANK" in environment:
        return
    found = _of_srun(environment) or _of_mpirun(environment)
    if found is None or found["WORLD_SIZE"] == "1":
        return
    for name, value in found.items():
        environment.setdefault(name, value)


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: `n[03-05,9],m1` begins with `n03`."""
    parts = re.match(r"(?P<stem>[^,\[]*)(\[(?P<first>\w+)[^\]]*\])?(?P<rest>[^,]*)", nodes)
    assert parts is not None  # it matches anything
    return f"{parts['stem']}{parts['first'] or ''}{parts['rest']}"


def tasks_on(node: int, counts: str) -> int:
    """Tasks on a node, of Slurm's counts by node: `2(x3),1` are three nodes of two tasks and one of one."""
    for part in counts.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        node -= int(times or 1)
        if node < 0:
            return int(count)
    raise ValueError(f"{counts!r} names no node {node}")


def _of_srun(environment: Mapping[str, str]) -> dict[str, str] | None:
    """A batch script has most of these variables too, but is no step."""
    if not {"SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"} <= environment.keys():
        return None
    here = tasks_on(int(environment.get("SLURM_NODEID", "0")), environment["SLURM_STEP_TASKS_PER_NODE"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": _port_of(f"{environment.get('SLURM_JOB_ID')}.{environment['SLURM_STEP_ID']}"),
    }


def _of_mpirun(environment: Mapping[str, str]) -> dict[str, str] | None:
    for names in _MPI:
        if set(names.values()) <= environment.keys():
            found = {name: environment[variable] for name, variable in names.items()}
            if found["LOCAL_WORLD_SIZE"] == found["WORLD_SIZE"]:
                found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port_of(str(os.getppid()))}
            return found
    return None


def _port_of(name: str) -> str:
    """The same on all ranks, another one for the next group of them."""
    return str(_FIRST_PORT + zlib.crc32(name.encode()) % _PORTS)
