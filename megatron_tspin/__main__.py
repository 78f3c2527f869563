"""`python -m megatron_tspin` is the `tspin` command, as torchrun can launch it."""

import sys

from megatron_tspin.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
