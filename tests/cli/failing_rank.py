"""A program of `test_lost_rank`: one of two ranks, the second of which fails while the first waits for it.

    python failing_rank.py ERROR

The command goes through `main` as any other. Taking the groups down waits for the peers here, as NCCL's may, and so
does an orderly end of the process, as torch's may for collectives that are under way.
"""

import argparse
import atexit
import sys
import time

from megatron_tspin.cli import main as main_module
from megatron_tspin.config import ParallelSection
from megatron_tspin.errors import InputError

ERRORS = {"input": InputError("line 3 is bad"), "bug": KeyError("a bug")}


def command(args: argparse.Namespace) -> int:
    import torch
    import torch.distributed as dist

    from megatron_tspin.parallel import LONG_TIMEOUT, STEP_TIMEOUT, distributed, sum_over_replicas

    dist.destroy_process_group = lambda group=None: time.sleep(3600)
    atexit.register(time.sleep, 3600)
    with distributed(ParallelSection(data_parallel_size=2)) as topology:
        for group, timeout in ((dist.group.WORLD, LONG_TIMEOUT), (topology.dp_group, STEP_TIMEOUT)):
            found = group._get_backend(torch.device("cpu")).options._timeout
            assert found == timeout, f"{group.group_desc} waits {found}"
        if topology.rank == 1:
            raise ERRORS[args.error]
        sum_over_replicas(torch.zeros(1), topology)
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("error", choices=ERRORS)
    made.set_defaults(run=command)
    return made


if __name__ == "__main__":
    main_module.build_parser = parser
    sys.exit(main_module.main())
