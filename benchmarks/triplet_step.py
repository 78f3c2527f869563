"""`tspin bench step` as a script."""

import sys

from megatron_tspin.cli.main import main

if __name__ == "__main__":  # every side is a process that imports this file again
    sys.exit(main(["bench", "step", *sys.argv[1:]]))
