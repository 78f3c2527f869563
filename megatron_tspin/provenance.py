"""By what, and where, something was made: versions, commit, hosts, job."""

import os
import platform
import re
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import megatron_tspin

_PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "tokenizers",
    "safetensors",
    "sentencepiece",
    "numpy",
    "pydantic",
)
_NVIDIA = Path("/proc/driver/nvidia")
_SETTINGS = re.compile(r"^(NCCL_|GLOO_|TORCH_|CUDA_|OMP_|PYTORCH_|NVTE_|TSPIN_|HF_H|LD_LIBRARY_PATH)")


def versions() -> dict[str, str]:
    """Of Python, this project and what decides about results."""
    found = {"python": platform.python_version(), "megatron_tspin": megatron_tspin.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Of the checkout that this package belongs to; None where it was installed without one.

    Read from git's files (gitrepository-layout): the nodes of a cluster need no git.
    """
    git = Path(megatron_tspin.__file__).resolve().parents[1] / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        reference = head.removeprefix("ref: ")
        loose = git / reference
        if loose.is_file():
            return loose.read_text(encoding="utf-8").strip()
        packed = (git / "packed-refs").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split()[0] for line in packed if line.endswith(f" {reference}")), None)


def place() -> dict[str, Any]:
    """Where this process and the ranks that it starts run."""
    found: dict[str, Any] = {"host": socket.gethostname(), "commit": commit()}
    if "SLURM_JOB_ID" in os.environ:
        found |= {"job": os.environ["SLURM_JOB_ID"], "nodes": os.environ.get("SLURM_JOB_NODELIST")}
    return found


def machine() -> dict[str, Any]:
    """This host, as far as it tells without torch."""
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    for gpu in sorted(_NVIDIA.glob("gpus/*/information")):
        model = re.search(r"^Model:\s*(.+)$", gpu.read_text(encoding="utf-8"), re.MULTILINE)
        found.setdefault("gpus", []).append(model[1] if model else "unknown")
    driver = _NVIDIA / "version"
    if driver.is_file():
        found["nvidia_driver"] = driver.read_text(encoding="utf-8").splitlines()[0]
    return found


def settings_of_environment() -> dict[str, str]:
    """Variables that change how ranks are started, meet and compute."""
    return {name: value for name, value in sorted(os.environ.items()) if _SETTINGS.match(name)}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()
