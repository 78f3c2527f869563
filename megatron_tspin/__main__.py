"""`python -m megatron_tspin` is the `tspin` command, as torchrun and srun can launch it."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python put the working folder first: a `random.py` there would be imported in place of Python's own.
    if sys.path and not sys.flags.safe_path and Path(sys.path[0]).absolute() != Path(__file__).absolute().parents[1]:
        del sys.path[0]
    from megatron_tspin.log import LOG_FILE_VARIABLE

    if LOG_FILE_VARIABLE in os.environ:  # a rank that a driver started
        from megatron_tspin.rank_stderr import separate_stderr
        from megatron_tspin.rank_variables import adopt_launcher

        adopt_launcher(os.environ)
        separate_stderr()
    from megatron_tspin.cli.main import main

    sys.exit(main(sys.argv[1:]))
