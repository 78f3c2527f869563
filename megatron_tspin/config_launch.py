"""How stages are started, where, and how they are watched."""

from typing import Literal

from pydantic import model_validator

from megatron_tspin.config_section import Section, execution


class LaunchSection(Section):
    """The processes of a stage, and the Slurm job that `tspin submit` asks for. Nothing here changes results."""

    launcher: Literal["local", "slurm"] = execution(
        "local",
        None,
        "Who starts the ranks of a stage: torchrun on this host, or srun inside a Slurm job (set by `tspin submit`).",
    )
    hang_seconds: float = execution(
        300.0, None, "A rank that stands still for longer within a step, or at a token, ends its stage.", gt=0
    )
    long_hang_seconds: float = execution(
        3600.0, None, "The same between steps, where ranks start, read, write, hash, compare and score.", gt=0
    )
    stop_seconds: float = execution(
        300.0, None, "How long a stage that is asked to stop may take to finish its step or shard and save.", gt=0
    )
    max_restarts: int = execution(
        1, None, "How often a job starts a run again after a stage failed (exit code 3); bad input never.", ge=0
    )
    nodes: int | None = execution(None, None, "Nodes of the job. Default: as many as the largest stage needs.", ge=1)
    gpus_per_node: int = execution(8, None, "GPUs of a node, one rank each; 0 on nodes without.", ge=0)
    ranks_per_node: int | None = execution(None, None, "Most ranks on a node. Default: a rank a GPU.", ge=1)
    cpus_per_rank: int | None = execution(None, None, "Cores of a rank (--cpus-per-task).", ge=1)
    time: str | int | None = execution(None, None, "Time limit of the job as sbatch reads it: 24:00:00, or minutes.")
    stop_before_end: int = execution(
        300, None, "Seconds before the time limit at which the run is asked to stop, and is queued again.", ge=1
    )
    partition: str | None = execution(None, None, "Slurm partition.")
    account: str | None = execution(None, None, "Slurm account.")
    qos: str | None = execution(None, None, "Slurm quality of service.")
    modules: list[str] = execution([], None, "Environment modules that the job loads.")
    exports: dict[str, str] = execution({}, None, "Environment variables that the job sets.")
    setup: list[str] = execution([], None, "Lines of shell before the run, e.g. that activate an environment.")
    sbatch: list[str] = execution([], None, "More options of sbatch, e.g. --reservation=mine.")
    srun: list[str] = execution([], None, "More options of every srun step, e.g. --cpu-bind=cores.")
    container: Literal["pyxis", "apptainer"] | None = execution(
        None, None, "What runs the ranks in a container image. The driver itself stays outside."
    )
    image: str | None = execution(None, None, "The container image, as its runtime names it.")
    mounts: list[str] = execution([], None, "Folders that the container sees, as HOST:CONTAINER.")

    @model_validator(mode="after")
    def _fits(self) -> "LaunchSection":
        if (self.container is None) != (self.image is None):
            raise ValueError("launch.container and launch.image belong together: set both or none")
        if self.gpus_per_node == 0 and self.ranks_per_node is None and self.launcher == "slurm":
            raise ValueError("launch.ranks_per_node has to be set where launch.gpus_per_node is 0")
        return self

    @property
    def most_ranks_on_a_node(self) -> int:
        """Ranks that a node holds."""
        return self.ranks_per_node or self.gpus_per_node or 1

    def nodes_for(self, world_size: int) -> int:
        """Nodes that so many ranks need."""
        return -(-world_size // self.most_ranks_on_a_node)
