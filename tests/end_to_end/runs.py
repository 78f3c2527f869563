"""Small runs through the real command line, made in the background, two at a time."""

import fcntl
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.end_to_end.small_run import succeed, tree_of, write_config, write_data

TP1: dict[str, Any] = {}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel__tensor_model_parallel_size": 2},
    "pp2": {"parallel__pipeline_model_parallel_size": 2},
    # Trains as two replicas, generates as one policy split over two ranks.
    "dp2": {
        "parallel__data_parallel_size": 2,
        "parallel__use_distributed_optimizer": True,
        "generation__data_parallel_size": 1,
        "generation__tensor_model_parallel_size": 2,
    },
}
METHODS: dict[str, dict[str, Any]] = {
    method: {"objective__method": method, "evaluation__greedy": False} for method in ("spin", "tspin_ref", "sft")
}
BF16: dict[str, Any] = {
    "precision__bf16": True,
    "precision__rescored_prompts": 12,
    "generation__temperature": 0.6,
    "generation__top_p": 0.9,
    "evaluation__greedy": False,
}
SETTINGS = ({"tp1": TP1, **LAYOUTS}, {**METHODS, "bf16": BF16})
"""By name, in the two parts that are made together."""


class Runs:
    """`runs[name]` is the folder of a finished run; a part of them is started with the first that is asked for.

    Workers of pytest-xdist share the folder: whoever comes first makes a run, the others wait for it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._made: dict[str, Future[Path]] = {}

    def __getitem__(self, name: str) -> Path:
        if name not in self._made:
            (part,) = (part for part in SETTINGS if name in part)
            self._made |= {each: self._pool.submit(self._make, each, settings) for each, settings in part.items()}
        return self._made[name].result()

    def config(self, name: str) -> Path:
        return self.folder / f"{name}.yaml"

    def _make(self, name: str, settings: dict[str, Any]) -> Path:
        run_dir, done = self.folder / name, self.folder / f"{name}.done"
        with self._alone():
            if not (self.folder / "annotated.jsonl").exists():
                write_data(self.folder)
        with self._alone(name):
            if not done.exists():
                write_config(self.config(name), tree_of(self.folder, run_dir, **settings))
                succeed("run", "--config", self.config(name))
                done.touch()
        return run_dir

    @contextmanager
    def _alone(self, name: str = "data") -> Iterator[None]:
        with (self.folder / f"{name}.lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
