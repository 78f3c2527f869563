"""`python -m megatron_tspin` is the `tspin` command, as torchrun can launch it."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python put the working folder first: a `random.py` there would be imported in place of Python's own.
    if sys.path and not sys.flags.safe_path and Path(sys.path[0]).absolute() != Path(__file__).absolute().parents[1]:
        del sys.path[0]
    from megatron_tspin.cli.main import main

    sys.exit(main(sys.argv[1:]))
