"""The process group of a stage: who I am among TP, CP, PP and DP."""

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_tspin.config import ParallelSection
from megatron_tspin.errors import ArtifactError, InputError, TspinError
from megatron_tspin.heartbeat import busy, waiting
from megatron_tspin.lost_rank import explain
from megatron_tspin.platform import backend, device, prepare_platform, seed_everything
from megatron_tspin.rendezvous import check_rendezvous, meeting

Value = TypeVar("Value")

# For the start, and of megatron-core's groups, which a step's collectives go over: there no rank is long behind another
# unless it hangs.
STEP_TIMEOUT = datetime.timedelta(minutes=10)

# Of the group of all ranks, which meets between steps: when one replica has a shard more to answer than another, when
# rank 0 hashes or compares with transformers, when checkpoints are written or read, and when the user's scorer, which
# may take any time, judges all answers. A rank that is gone is noticed at once all the same.
LONG_TIMEOUT = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Topology:
    """This rank's place in the layout. Group handles are torch.distributed process groups."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    tp_group: dist.ProcessGroup
    pp_rank: int
    pp_size: int
    pp_group: dist.ProcessGroup
    dp_rank: int
    dp_size: int
    dp_group: dist.ProcessGroup
    cp_rank: int
    cp_size: int
    cp_group: dist.ProcessGroup
    ep_rank: int
    ep_size: int
    """EP: consecutive ranks of CP x DP, CP being the faster."""
    dp_cp_group: dist.ProcessGroup
    """DP x CP: the ranks that hold the same part of the policy."""
    model_parallel_group: dist.ProcessGroup
    """TP x PP: the ranks that hold one policy."""
    num_virtual_stages: int
    """Groups of layers that this rank holds."""
    sequence_parallel: bool
    equal_rows: bool
    """See `ParallelSection.equal_rows`."""
    row_length_multiple: int
    """See `ParallelSection.row_length_multiple`."""
    row_count_multiple: int
    """See `ParallelSection.row_count_multiple`."""

    @property
    def is_first_pipeline_stage(self) -> bool:
        """Whether this rank embeds the tokens."""
        return self.pp_rank == 0

    @property
    def is_last_pipeline_stage(self) -> bool:
        """Whether this rank holds the head."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_output_rank(self) -> bool:
        """Whether this rank writes the results of its replica: the head's first TP and CP rank."""
        return self.is_last_pipeline_stage and self.tp_rank == 0 and self.cp_rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this rank logs and draws progress bars."""
        return self.rank == 0


@contextmanager
def distributed(
    layout: ParallelSection, seed: int = 0, tokens_multiple: int = 1, patience: datetime.timedelta | None = None
) -> Iterator[Topology]:
    """Joins the ranks that torchrun (or Slurm) started into megatron-core's groups, and leaves them at the end.

    After a failure several ranks do not leave: taking groups down may wait for peers that sit in a collective. The
    process has to end instead (`groups_are_up`), which closes its connections, so that its peers fail at once.

    Args:
        layout: TP, CP, PP and DP.
        seed: Of libraries that draw; nothing of ours does.
        tokens_multiple: `PrecisionSection.tokens_multiple`.
        patience: How long ranks wait for each other. Default: `STEP_TIMEOUT` in a step, `LONG_TIMEOUT` between.

    Raises:
        InputError: The number of processes is not TP x CP x PP x DP, or they cannot meet as they are set up.
        StageError: The ranks did not meet, or a collective of the block failed because another rank hangs or is gone;
            names the collective.
    """
    prepare_platform(layout.cpu_threads)
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size != layout.world_size:
        raise InputError(
            f"{world_size} processes were started but TP x CP x PP x DP = {layout.tensor_model_parallel_size} x "
            f"{layout.context_parallel_size} x {layout.pipeline_model_parallel_size} x {layout.data_parallel_size} "
            f"needs {layout.world_size}"
        )
    check_rendezvous(backend())
    with meeting(backend()):
        dist.init_process_group(backend(), timeout=patience or STEP_TIMEOUT)
    dist.distributed_c10d._set_pg_timeout(patience or LONG_TIMEOUT)
    try:
        yield build_topology(layout, seed, tokens_multiple, patience or STEP_TIMEOUT)
    except BaseException as error:
        if world_size == 1:
            leave_groups()
        lost = explain(error)
        if lost is not None:
            raise lost from error
        raise
    leave_groups()


def build_topology(
    layout: ParallelSection, seed: int = 0, tokens_multiple: int = 1, patience: datetime.timedelta = STEP_TIMEOUT
) -> Topology:
    """Builds megatron-core's groups over an initialised torch.distributed.

    The order of ranks is Megatron's: TP fastest, then CP, then DP, then PP.
    """
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.tensor_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=patience.total_seconds() / 60,
    )
    seed_everything(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 1)
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=layout.tensor_model_parallel_size,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=layout.pipeline_model_parallel_size,
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=layout.data_parallel_size,
        dp_group=parallel_state.get_data_parallel_group(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=layout.context_parallel_size,
        cp_group=parallel_state.get_context_parallel_group(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=layout.expert_model_parallel_size,
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        model_parallel_group=parallel_state.get_model_parallel_group(),
        num_virtual_stages=layout.num_virtual_stages,
        sequence_parallel=layout.sequence_parallel,
        equal_rows=layout.equal_rows,
        row_length_multiple=layout.row_length_multiple(tokens_multiple),
        row_count_multiple=layout.row_count_multiple,
    )


def leave_groups() -> None:
    """Takes megatron-core's groups and torch.distributed down."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def groups_are_up() -> bool:
    """Whether this process is in groups, which after a failure it must end with rather than leave."""
    return dist.is_initialized()


def wait_for_all_ranks() -> None:
    """Waits until every rank has come here, however long the work before it took one of them."""
    with waiting("waiting for all ranks"):
        dist.barrier()


def broadcast_within_policy(tensor: torch.Tensor, topology: Topology) -> Any:
    """Gives all ranks of TP x PP the values of the last stage's first TP rank, in place.

    Returns:
        To be waited for (`wait()`) before the tensor is used; None if it is there.
    """
    if topology.tp_size * topology.pp_size == 1:
        return None
    source = (topology.pp_size - 1) * topology.tp_size  # TP is the fastest in the order of ranks
    return dist.broadcast(tensor, group=topology.model_parallel_group, group_src=source, async_op=True)


def broadcast_from_last_pipeline_stage(tensor: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Gives every pipeline stage the last stage's values, in place."""
    if topology.pp_size > 1:
        dist.broadcast(tensor, group=topology.pp_group, group_src=topology.pp_size - 1)
    return tensor


def sum_over_replicas(tensor: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Sums over DP, in place."""
    if topology.dp_size > 1:
        dist.all_reduce(tensor, group=topology.dp_group)
    return tensor


def any_rank(asks: bool, topology: Topology) -> bool:
    """Whether one rank at least says yes; all get the same answer. They come here together, as in a step."""
    return _any_of_groups(asks, (topology.model_parallel_group, topology.dp_cp_group))


def any_rank_of_policy(asks: bool, topology: Topology) -> bool:
    """As `any_rank`, among the ranks of TP x PP that hold one policy."""
    return _any_of_groups(asks, (topology.model_parallel_group,))


def _any_of_groups(asks: bool, groups: tuple[dist.ProcessGroup, ...]) -> bool:
    flag = torch.tensor(int(asks), device=device())
    for group in groups:
        if group.size() > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    return bool(flag.item())


def on_first_rank(compute: Callable[[], Value], topology: Topology) -> Value:
    """What `compute` returns on rank 0, on all ranks; what it raises there, all raise. It must survive pickling.

    For everything that is read from the disk to decide what to do: a network file system may show two ranks two states.
    """
    answer: list[Any] = [None, None]
    if topology.rank == 0:
        try:
            with busy("working for all ranks"):
                answer[0] = compute()
        except TspinError as error:
            answer[1] = error
    with waiting("waiting for rank 0"):
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    value: Value = answer[0]
    return value


def refuse_stale_facts(what: str, facts: dict[str, Any], topology: Topology) -> None:
    """For what every rank reads by itself: refuses, on all ranks, that one has read something else than rank 0.

    Args:
        what: Says in the message what was read.
        facts: Digests of what this rank has read, by name.
        topology: This rank's place.

    Raises:
        ArtifactError: Names the rank, the fact and both values.
    """
    found: list[Any] = [None] * topology.world_size
    with waiting("waiting to compare what was read"):
        dist.all_gather_object(found, facts)
    for rank, others in enumerate(found):
        different = [f"{name} is {others.get(name)}, on rank 0 {value}" for name, value in found[0].items()
                     if others.get(name) != value]  # fmt: skip
        if different:
            raise ArtifactError(
                f"{what}: rank {rank} reads another state of the disk: {'; '.join(different)}; run the same command "
                "again once the file system shows the same files on every node"
            )
