"""`tspin bench gpu` as a script."""

import sys

from megatron_tspin.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", "gpu", *sys.argv[1:]]))
