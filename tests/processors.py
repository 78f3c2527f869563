"""The tests of exactness under the kernels of other processors: `python -m tests.processors`.

torch chooses its kernels by what the processor can do, and MKL its by the processor's maker; both can be told to take
those of a lesser one. Kernels, MKL's mode and the number of threads are paired so that each meets each of the others.
Under all of them log-probs, gradients, packed rows and answers are compared; under one of each kind of kernels whole
trajectories too, and under the oldest ones, which differ most from any others, whole runs.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from tests.rank_pool import THREADS
from tests.rounding import BOUNDS, RECORD

EXACT = "exact and not slow"
SUMS = f"{EXACT} and not trajectory"
WHOLE_RUNS = "tests/end_to_end"
BOTH_CORES = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
CAPABILITIES = ("default", "avx2", "avx512")
_SHOWN_LINES = 60
_WIDTH = 110


@dataclass(frozen=True)
class Processor:
    """What a run of the tests is told to compute with, and which tests."""

    capability: str
    compatible: bool
    threads: int
    tests: tuple[str, ...]

    def environment(self, record: Path) -> dict[str, str]:
        """Of pytest and all that it starts."""
        chosen = {
            "ATEN_CPU_CAPABILITY": self.capability,
            THREADS: str(self.threads),
            "OMP_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "passive",  # there are more threads than cores, and spinning ones starve the others
            RECORD: str(record),
        }
        kept = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
        return {**kept, **chosen, **({"MKL_CBWR": "COMPATIBLE"} if self.compatible else {})}


def processors() -> list[Processor]:
    """Those that this machine can stand in for."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    here = CAPABILITIES[: CAPABILITIES.index(best) + 1] if best in CAPABILITIES else ("default",)
    sums, trajectories = ("-m", SUMS), ("-m", EXACT, "--ignore", WHOLE_RUNS)
    every = [
        Processor("default", True, 1, ("-m", EXACT)),
        Processor("default", False, 2, sums),
        Processor("avx2", True, 2, sums),
        Processor("avx2", False, 1, trajectories),
        Processor("avx512", True, 1, sums),
        Processor("avx512", False, 2, trajectories),
    ]
    return [processor for processor in every if processor.capability in here]


def main() -> int:
    """Runs the tests under each processor and prints a table; returns 1 if any failed."""
    console = Console(width=_WIDTH)
    table = Table("kernels", "MKL", "threads", "result", "time", *BOUNDS, box=box.SIMPLE_HEAD)
    failed = False
    for processor in processors():
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            record = Path(folder) / "rounding.jsonl"
            command = [sys.executable, "-m", "pytest", "-q", *BOTH_CORES, *processor.tests, *sys.argv[1:]]
            done = subprocess.run(command, env=processor.environment(record), capture_output=True, text=True)
            shares = largest_shares(record)
        lines = done.stdout.splitlines()
        if done.returncode:
            failed = True
            console.print("\n".join(lines[-_SHOWN_LINES:]), markup=False, highlight=False)
        mode = "compatible" if processor.compatible else "own"
        counts = re.findall(r"\d+ (?:failed|passed|error)", lines[-1]) if lines else []
        result = ", ".join(counts) or f"exit code {done.returncode}"
        seconds = f"{time.monotonic() - started:.0f} s"
        measured = [f"{100 * shares[kind]:.0f} %" if kind in shares else "" for kind in BOUNDS]
        table.add_row(processor.capability, mode, str(processor.threads), result, seconds, *measured)
        console.print(f"{processor.capability}, MKL {mode}, {processor.threads} threads: {result} in {seconds}")
    console.print(table)
    console.print("Percentages are of the bounds in tests/rounding.py: the largest of all comparisons.")
    return int(failed)


def largest_shares(record: Path) -> dict[str, float]:
    """By kind of bound, how much of it the worst comparison took."""
    found: dict[str, float] = {}
    for line in record.read_text().splitlines() if record.is_file() else []:
        kind, share = json.loads(line)
        found[kind] = max(share, found.get(kind, 0.0))
    return found


if __name__ == "__main__":
    sys.exit(main())
