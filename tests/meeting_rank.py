"""A program of `test_rendezvous`: a rank of two, which goes through `main` as any command does.

    python meeting_rank.py SECONDS

waits that long for the other one, and says after a tenth of a second that it is late.
"""

import argparse
import datetime
import functools
import sys

from megatron_tspin.cli import main as main_module
from megatron_tspin.config import ParallelSection


def command(args: argparse.Namespace) -> int:
    from megatron_tspin import parallel

    parallel.meeting = functools.partial(parallel.meeting, late_seconds=0.1)
    parallel.STEP_TIMEOUT = datetime.timedelta(seconds=args.seconds)
    with parallel.distributed(ParallelSection(data_parallel_size=2)) as topology:
        sys.stdout.write(f"rank {topology.rank} met the other\n")
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("seconds", type=float)
    made.set_defaults(run=command)
    return made


if __name__ == "__main__":
    main_module.build_parser = parser
    sys.exit(main_module.main())
