"""`tspin export` as a script, for torchrun."""

import sys

from megatron_tspin.cli.main import main

if __name__ == "__main__":  # dist_checkpointing starts processes that import this file again
    sys.exit(main(["export", *sys.argv[1:]]))
