"""The process of a check: runs its cases and writes a line after each, so that nothing measured is lost.

The first line of the record names the cases and says what the figures are; then a line when a case starts and one when
it is over. A case whose failure leaves the device unusable ends the process with `POISONED`: the parent starts another
one with the cases that are left. Standard input is the parent's life line; when it closes, the whole group ends.
"""

import argparse
import dataclasses
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tspin.benchmark.gpu_report.case import FAILED, OK, REASON_CHARACTERS, SKIPPED, Case, Outcome, SkippedError

POISONED = 75
_GRAPHS = 128
PACKAGE = "megatron_tspin.benchmark.gpu_report"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases of a check that are left; returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {PACKAGE}.child")
    parser.add_argument("module", help="importable name of the check's module")
    parser.add_argument("record", type=Path, help="file that lines are appended to")
    parser.add_argument("--reduced", action="store_true")
    parser.add_argument("--done", type=int, default=0, help="cases that earlier processes dealt with")
    args = parser.parse_args(argv)
    _end_with_parent()
    with args.record.open("a", encoding="utf-8") as record:
        return run_cases(importlib.import_module(args.module), record, args.reduced, args.done)


def _end_with_parent() -> None:
    """Ends this process and what it started when the parent is gone: its end of standard input closes then."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    if os.getpgid(0) == os.getpid():
        threading.Thread(target=watch, daemon=True).start()


def run_cases(module: Any, record: Any, reduced: bool, done: int = 0) -> int:
    """Runs the cases of a check's module, from number `done`.

    Args:
        module: Has `FIGURES`, by name what a figure means, and `cases(reduced)`.
        record: Text stream.
        reduced: The small form.
        done: Cases to leave out.

    Returns:
        0, or `POISONED`.
    """
    cases: list[Case] = module.cases(reduced)
    _allow_many_graphs()
    if done == 0:
        figures = {name: dataclasses.asdict(meaning) for name, meaning in module.FIGURES.items()}
        _write(record, {"cases": [case.name for case in cases], "figures": figures})
    for number, case in enumerate(cases[done:], start=done):
        _write(record, {"started": number})
        outcome = _run(case, set(module.FIGURES))
        _write(record, {"finished": number, "outcome": dataclasses.asdict(outcome)})
        if not _device_is_well():
            return POISONED
    return 0


def _allow_many_graphs() -> None:
    """A check compiles one function for many shapes and types; past its limit torch would run it uncompiled."""
    if "torch" in sys.modules:
        import torch._dynamo

        torch._dynamo.config.recompile_limit = _GRAPHS


def _write(record: Any, line: dict[str, Any]) -> None:
    record.write(json.dumps(line) + "\n")
    record.flush()


def _run(case: Case, known: set[str]) -> Outcome:
    sys.stderr.write(f"--- {case.name}\n")
    started = time.perf_counter()
    status, reason, figures = OK, None, {}
    try:
        figures = dict(case.run())
    except SkippedError as error:
        status, reason = SKIPPED, str(error)[:REASON_CHARACTERS]
    except Exception as error:
        traceback.print_exc()
        status, reason = FAILED, f"{type(error).__name__}: {error}"[:REASON_CHARACTERS]
    assert set(figures) <= known, f"{case.name}: {set(figures) - known} are figures that the check does not explain"
    return Outcome(case.name, status, round(time.perf_counter() - started, 3), reason, figures)


def _device_is_well() -> bool:
    """Whether CUDA still answers; also gives back what the case left. After some errors every call fails."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        traceback.print_exc()
        return False
    return True


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a broken device must not hang in destructors
