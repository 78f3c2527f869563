"""`tspin submit`: a run as a Slurm job."""

import datetime
import re
import shutil
import subprocess
from pathlib import Path

from megatron_tspin.config import Config
from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger
from megatron_tspin.run_folder import RunFolder
from megatron_tspin.selfplay.batch_script import batch_script, num_nodes
from megatron_tspin.selfplay.driver import check_before
from megatron_tspin.selfplay.plan import plan
from megatron_tspin.selfplay.run_config import check_same_config, with_absolute_paths, with_template_date, write_config
from megatron_tspin.storage import write_text

_JOB = re.compile(r"^(\d+)")

logger = get_logger(__name__)


def submit(config: Config, dry_run: bool = False) -> str | None:
    """Writes the resolved config and the job's script, and hands that to sbatch.

    The input is checked here as `tspin run` checks it, so that a bad line does not wait in a queue first.

    Args:
        config: The run.
        dry_run: Write both files and submit nothing.

    Returns:
        The job's number; None after a dry run.

    Raises:
        InputError: The input, the config or the job cannot be used, or sbatch refuses.
    """
    config = with_absolute_paths(config, Path.cwd())
    config = with_template_date(config, datetime.date.today().isoformat())
    folder = RunFolder(Path(config.run_dir))
    _check_job(config)
    check_same_config(config)
    check_before(config)
    folder.logs.mkdir(parents=True, exist_ok=True)
    write_config(config)
    write_text(folder.batch_script, batch_script(config))
    if dry_run:
        logger.info("job script: %s", folder.batch_script)
        logger.info("resolved config: %s", folder.config)
        return None
    job = _sbatch(folder.batch_script)
    write_text(folder.job, f"{job}\n")
    return job


def _check_job(config: Config) -> None:
    """Refuses what Slurm would only refuse when a stage is started."""
    needed = {stage.name: config.launch.nodes_for(stage.world_size) for stage in plan(config)}
    largest = max(needed, key=lambda name: needed[name])
    if config.launch.gpus_per_node == 0 and config.launch.ranks_per_node is None:
        raise InputError("launch.gpus_per_node = 0: set launch.ranks_per_node, the most ranks on a node")
    if num_nodes(config) < needed[largest]:
        raise InputError(
            f"launch.nodes = {config.launch.nodes}: stage {largest} needs {needed[largest]}, with "
            f"{config.launch.most_ranks_on_a_node} ranks on a node; leave it out, or lower the layout"
        )


def _sbatch(script: Path) -> str:
    if shutil.which("sbatch") is None:
        raise InputError(f"sbatch is not on this host; submit {script} from a login node of the cluster")
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    found = _JOB.match(done.stdout)
    if done.returncode or found is None:
        raise InputError(f"sbatch refused {script}: {done.stderr.strip() or done.stdout.strip()}")
    return found[1]
