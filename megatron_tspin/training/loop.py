"""One self-play iteration of training."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_tspin.config import Config
from megatron_tspin.errors import DivergenceError
from megatron_tspin.heartbeat import beat
from megatron_tspin.log import get_logger, progress_bar
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.fp8_linear import weights_changed
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.models.row_layout import ContextShare
from megatron_tspin.objective.batches import BatchPlanner, Triplet
from megatron_tspin.objective.forward import make_forward_step
from megatron_tspin.objective.packing import row_packing, work_model
from megatron_tspin.objective.roles import computed_roles
from megatron_tspin.parallel import Topology, any_rank, broadcast_from_last_pipeline_stage, sum_over_replicas
from megatron_tspin.platform import device
from megatron_tspin.precision import uses_delayed_scaling
from megatron_tspin.step_metrics import SUMMED, TEACHING, StepMetrics
from megatron_tspin.stop_request import stop_requested
from megatron_tspin.training.learning_rate import learning_rate
from megatron_tspin.training.optimizer import build_optimizer, gradient_norm, update

_log = get_logger(__name__)


def iteration_beta(config: Config, iteration: int) -> float:
    """Weight of the historical advantage in a self-play iteration (0 in the first one unless configured)."""
    return config.objective.first_iteration_beta if iteration == 0 else config.objective.beta


@dataclass
class Trainer:
    """A policy with its optimizer, and the step that improves it.

    Attributes:
        config: The run.
        iteration: Self-play iteration.
        topology: This rank's place.
        chunks: megatron-core's DDP around each virtual stage of the policy on this rank, mostly one.
        optimizer: megatron-core's optimizer.
        num_steps: Steps of the iteration.
        done: Steps made so far.
        stopping: A rank was asked to stop, so that the step just made is the last for now.
    """

    config: Config
    iteration: int
    topology: Topology
    chunks: list[Any]
    optimizer: Any
    num_steps: int
    done: int = 0
    stopping: bool = False

    def __post_init__(self) -> None:
        self.roles = computed_roles(self.config.objective.method, iteration_beta(self.config, self.iteration))
        self.planner = batch_planner(self.config, self.roles, self.topology, self.ddp.module.architecture)
        self._forward_step = make_forward_step(self.config.objective, iteration_beta(self.config, self.iteration))
        self._run_schedule = get_forward_backward_func()

    def train_step(self, triplets: list[Triplet]) -> StepMetrics:
        """One optimizer step over a global batch.

        Raises:
            DivergenceError: The loss or the gradient is not finite; no update was made.
        """
        started = time.perf_counter()
        totals = dict(zip(SUMMED, self.forward_backward(triplets).tolist(), strict=True))
        norm = gradient_norm(self.optimizer)
        self._refuse_divergence(totals["loss"], norm, triplets)
        rate = learning_rate(
            self.done, self.num_steps, self.config.optimizer.peak_lr(self.iteration), self.config.optimizer
        )
        teaches = totals[TEACHING] > 0
        if teaches:
            update(self.optimizer, norm, rate, self.config.optimizer.clip_grad)
            for chunk in self.chunks:
                weights_changed(chunk.module)
        self.done += 1
        return StepMetrics.from_sums(
            totals,
            self.roles,
            {
                "iteration": self.iteration,
                "step": self.done,
                "learning_rate": rate,
                "grad_norm": norm,
                "update_skipped": not teaches,
                "seconds": time.perf_counter() - started,
            },
            self.config.training.diagnostics,
        )

    @property
    def ddp(self) -> Any:
        """The DDP of the only virtual stage, or of the first one."""
        return self.chunks[0]

    def whole_policy(self) -> list[PolicyModel]:
        """The bare policy with every update in its parameters, to be saved or exported; all ranks call it."""
        if self.config.parallel.overlap_param_gather:
            for chunk in self.chunks:  # the gather of the last update still waits for the next forward pass
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()
        return [chunk.module for chunk in self.chunks]

    def forward_backward(self, triplets: list[Triplet]) -> torch.Tensor:
        """Runs the micro-batches of a global batch and leaves the gradients of its mean loss; makes no update.

        Returns:
            The sums of `SUMMED` over the global batch, float64, on every rank.
        """
        micro_batches = self.planner.plan(triplets)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._run_schedule(
            forward_step_func=self._forward_step,
            data_iterator=[iter(micro_batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].rows.row_length,
            micro_batch_size=micro_batches[0].rows.tokens.shape[0],
            forward_only=False,
        )
        sums = torch.zeros(len(SUMMED), dtype=torch.float64, device=device())
        if self.topology.is_last_pipeline_stage:
            sums += torch.stack(outputs).sum(dim=0)
        return broadcast_from_last_pipeline_stage(sum_over_replicas(sums, self.topology), self.topology)

    def _refuse_divergence(self, loss: float, norm: float, triplets: list[Triplet]) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
        ids = ", ".join(triplet.id for triplet in triplets)
        raise DivergenceError(
            f"iteration {self.iteration}, step {self.done + 1}: {what} is not finite; no update was made. "
            f"Lower --lr or --tspin-alpha, or use the logistic link. Prompts of the batch: {ids}"
        )

    def train(
        self,
        global_batch: Callable[[int], list[Triplet]],
        on_step: Callable[[StepMetrics], None],
    ) -> None:
        """Makes the steps that are left, or some of them when a stop is requested.

        Args:
            global_batch: The triplets of a step, counted from 0.
            on_step: Called after each step, e.g. to write metrics and checkpoints.
        """
        if self.iteration == 0 and self.done == 0 and uses_delayed_scaling(self.config.precision):
            # Delayed scaling has nothing to go by yet, and scales of 1 would turn small gradients into zeros: one pass
            # whose gradients nobody takes gives it the first values.
            self.forward_backward(global_batch(0))
        title = f"train iteration {self.iteration}"
        with progress_bar(title, self.num_steps, "step", self.topology.speaks, done=self.done) as bar:
            while self.done < self.num_steps:
                beat(f"{title}, step {self.done + 1} of {self.num_steps}")
                metrics = self.train_step(global_batch(self.done))
                self.stopping = any_rank(stop_requested() is not None, self.topology)
                on_step(metrics)
                bar.set_postfix(loss=f"{metrics.loss:.4g}", refresh=False)
                bar.update()
                if self.stopping:
                    break


def batch_planner(
    config: Config, roles: tuple[str, ...], topology: Topology, architecture: Architecture
) -> BatchPlanner:
    """The configured way from triplets to this rank's micro-batches."""
    return BatchPlanner(
        packing=row_packing(config),
        work=work_model(architecture),
        roles=roles,
        micro_batch_size=config.training.micro_batch_size,
        multiple=topology.row_length_multiple,
        replica=topology.dp_rank,
        replicas=topology.dp_size,
        context=ContextShare(topology.cp_rank, topology.cp_size, topology.cp_group),
        diagnostics=config.training.diagnostics,
    )


def build_trainer(
    config: Config, iteration: int, topology: Topology, model: PolicyModel | list[PolicyModel], num_steps: int
) -> Trainer:
    """Wraps a loaded policy, or its virtual stages, for training."""
    models = [model] if isinstance(model, PolicyModel) else model
    # DDP keeps gradients in fp32 buffers whatever the parameters' type.
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        fp8_param_gather=config.precision.fp8_param_gather,
    )
    core = models[0].config
    chunks = [DistributedDataParallel(core, ddp_config, each) for each in models]
    if config.parallel.overlap_grad_reduce:
        syncs = [chunk.no_sync for chunk in chunks]
        core.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    optimizer = build_optimizer(chunks, config.optimizer, config.parallel, config.precision)
    core.finalize_model_grads_func = finalize_model_grads
    core.grad_scale_func = optimizer.scale_loss
    return Trainer(config, iteration, topology, chunks, optimizer, num_steps)
