"""The device, the versions, and the rates that everything else is compared with."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import megatron_tspin
from megatron_tspin.benchmark import rates
from megatron_tspin.benchmark.gpu_report.check import Case, Figures, Meaning
from megatron_tspin.benchmark.machine import describe_machine
from megatron_tspin.benchmark.stopwatch import Timing
from megatron_tspin.platform import has_cuda

_PACKAGES = ("triton", "transformers", "megatron-core", "transformer-engine")
_COMMIT_VARIABLE = "TSPIN_COMMIT"
_COMMIT_FILE = "COMMIT"
_TERA = 1e12
ABSENT = "not installed"

FIGURES = {
    "device": Meaning("", "name of the GPU, or of the CPU where there is none"),
    "driver": Meaning("", "version of the GPU's driver"),
    "memory_gib": Meaning("GiB", "memory of the device as the driver reports it"),
    "capability": Meaning("", "CUDA compute capability"),
    "cpu": Meaning("", "the host's processor and cores"),
    "python": Meaning("", "version"),
    "torch": Meaning("", "version"),
    "cuda": Meaning("", "version that torch was built for"),
    **{name: Meaning("", "version") for name in _PACKAGES},
    "megatron_tspin": Meaning("", "version"),
    "commit": Meaning("", f"of the working tree, else ${_COMMIT_VARIABLE} or a file {_COMMIT_FILE} beside the package"),
    "rate": Meaning(
        "T/s",
        "median rate: operations (two for a multiplication and its addition), or bytes read and "
        "written, in units of 10^12 a second",
    ),  # fmt: skip
    "low": Meaning("T/s", "rate of the slowest repeat"),
    "high": Meaning("T/s", "rate of the fastest repeat"),
    "repeats": Meaning("", "timed runs"),
    "size": Meaning("", "rows and columns of the square matrices; bytes copied, for the copy"),
    "share_of_bf16": Meaning("", "rate over that of the bf16 product, measured again beside it"),
}


def cases(reduced: bool) -> list[Case]:
    """Versions, and rates on random data."""
    return [
        Case("versions", _versions),
        Case("bf16 product", _bf16),
        Case("FP8 product", lambda: _fp8(fast=False)),
        Case("FP8 product, fast accumulation", lambda: _fp8(fast=True)),
        Case("copy", _copy),
    ]


def _versions() -> Figures:
    machine = describe_machine()
    found: dict[str, float | str] = {
        "device": str(machine["cpu"]),
        "cpu": f"{machine['cpu']}, {machine['cores']} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "megatron_tspin": megatron_tspin.__version__,
    }
    if has_cuda():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["memory_gib"] = properties.total_memory / 2**30
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["cuda"] = str(torch.version.cuda)
    return found | _driver() | _commit()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ABSENT


def _driver() -> dict[str, float | str]:
    """Asked of nvidia-smi, where that is."""
    if not has_cuda() or shutil.which("nvidia-smi") is None:
        return {}
    answer = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return {"driver": answer.splitlines()[0]} if answer else {}


def _commit() -> dict[str, float | str]:
    root = Path(megatron_tspin.__file__).parents[1]
    commit = os.environ.get(_COMMIT_VARIABLE, "")
    if not commit and (root / _COMMIT_FILE).is_file():
        commit = (root / _COMMIT_FILE).read_text().strip()
    if not commit and (root / ".git").exists() and shutil.which("git"):
        commit = _output(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
    return {"commit": commit} if commit else {}


def _output(command: list[str]) -> str:
    """What a command says; nothing where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _bf16() -> Figures:
    return _product(rates.product(rates.matrix_size()))


def _fp8(fast: bool) -> Figures:
    found = _product(rates.fp8_product(rates.matrix_size(), fast))
    return {**found, "share_of_bf16": found["rate"] * _TERA / rates.bf16_rate()}


def _product(timing: Timing) -> dict[str, float]:
    size = rates.matrix_size()
    return {**timing.rate(rates.matrix_flops(size) / _TERA), "size": float(size)}


def _copy() -> Figures:
    timing, count = rates.copy()
    return {**timing.rate(2 * count / _TERA), "size": float(count)}
