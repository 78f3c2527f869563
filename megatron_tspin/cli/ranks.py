"""Where a command's ranks come from: torchrun, or this process alone."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_tspin.config import Config, ParallelSection
from megatron_tspin.errors import InputError
from megatron_tspin.log import LOG_FILE_VARIABLE
from megatron_tspin.selfplay.launch import die_with_parent
from megatron_tspin.selfplay.lock import run_lock
from megatron_tspin.selfplay.run_config import check_same_config, with_absolute_paths


def enter_ranks(layout: ParallelSection) -> None:
    """Makes sure that there are as many processes as the layout asks for.

    Under torchrun this checks their number. Otherwise a layout of one rank becomes a world of this process alone.

    Raises:
        InputError: There are fewer or more processes than the layout has ranks; says how to start them.
    """
    if "RANK" in os.environ:
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != layout.world_size:
            raise InputError(f"{started} processes were started, but {_shape(layout)}; start {layout.world_size}")
        if "TORCHELASTIC_RUN_ID" in os.environ:
            die_with_parent()
    elif layout.world_size > 1:
        raise InputError(f"one process was started, but {_shape(layout)}; use\n{torchrun_command(layout.world_size)}")
    else:
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",  # any free one: nobody else has to find it
        }
    from megatron_tspin.platform import prepare_platform

    prepare_platform(layout.cpu_threads)


@contextmanager
def only_writer(config: Config) -> Iterator[None]:
    """Holds the run while a stage that a person started by hand writes into it; the driver's stages hold it already.

    Raises:
        InputError: A driver, or another stage started by hand, has the run; or the run began with other settings.
    """
    if LOG_FILE_VARIABLE in os.environ or os.environ.get("RANK", "0") != "0":
        yield
    else:
        with run_lock(Path(config.run_dir)) as lock:
            check_same_config(with_absolute_paths(config, Path.cwd()))
            yield
            lock.check()


def torchrun_command(world_size: int) -> str:
    """How to start the command of this process with more ranks, for people to paste."""
    return f"torchrun --nproc-per-node {world_size} -m megatron_tspin {shlex.join(sys.argv[1:])}"


def _shape(layout: ParallelSection) -> str:
    sizes = {
        "TP": layout.tensor_model_parallel_size,
        "CP": layout.context_parallel_size,
        "PP": layout.pipeline_model_parallel_size,
        "DP": layout.data_parallel_size,
    }
    return f"the layout {' x '.join(f'{name} {size}' for name, size in sizes.items())} needs {layout.world_size}"
