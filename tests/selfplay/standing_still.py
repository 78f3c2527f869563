"""A rank without a model that stands still: `standing_still.py RANK WHERE`, where `collective` is as in torch's."""

import os
import sys
import time
from pathlib import Path

from megatron_tspin.heartbeat import beat, start_beating
from megatron_tspin.log import LOG_FILE_VARIABLE
from megatron_tspin.run_folder import beats_folder


def stand(where: str) -> None:
    """Stands still where the test wants it."""
    if where == "collective":
        import torch.distributed.stand_in  # type: ignore[import-not-found]

        torch.distributed.stand_in.all_reduce()
    time.sleep(600)


def main() -> None:
    """Beats twice, then no more."""
    start_beating(beats_folder(Path(os.environ[LOG_FILE_VARIABLE])), int(sys.argv[1]))
    beat("train iteration 0, step 1")
    stand(sys.argv[2])


if __name__ == "__main__":
    main()
