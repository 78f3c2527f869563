"""Drives a fake run in a process of its own, so that tests can kill it: `drive.py WORLD`."""

import sys
from pathlib import Path

from megatron_tspin.config import Config
from megatron_tspin.errors import TspinError
from megatron_tspin.log import set_up_logging
from tests.selfplay.fake_world import FakeRun, tree_of

if __name__ == "__main__":
    world = Path(sys.argv[1])
    set_up_logging()
    run = FakeRun(world, Config.model_validate(tree_of(world)), behave=False)
    try:
        sys.exit(run.go())
    except TspinError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
