"""Every setting of a run, with its type, its default, its bounds and its command-line flag.

This, with the sections of the `config_*` modules, is the only place that holds a default. A run is
described by a YAML file with the sections below; flags (with Megatron's names where Megatron has one) override it.
Unknown keys, wrong types and impossible combinations are refused by name.
"""

import datetime
import math
from typing import Literal

from pydantic import field_validator, model_validator

from megatron_tspin.config_generation import GenerationSection
from megatron_tspin.config_launch import LaunchSection
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.config_section import Section, execution, report, result, setting

PAPER_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "
CHAT_TEMPLATE = "chat"
_ROW_UNIT = 8
_MOST_ROLES = 3
_LEAST_ROW = 2048

TokenizerRules = Literal["tokenizer.json", "transformers"]
Turns = Literal["last", "first", "every"]
Method = Literal["tspin", "spin", "tspin_ref", "sft"]


class ModelSection(Section):
    """The initial policy."""

    hf_checkpoint: str = result(..., "--hf-checkpoint", "Folder of the HF checkpoint (config.json, *.safetensors).")
    tokenizer: str | None = result(
        None, "--tokenizer-model", "Folder with tokenizer.json, or a SentencePiece model. Default: the checkpoint."
    )
    tokenizer_rules: TokenizerRules | None = result(
        None,
        None,
        "Whom to believe where transformers reads a tokenizer.json in another way than it says [refuse that].",
    )
    verify_conversion: bool = execution(
        True,
        "--tspin-verify-conversion",
        "Compare the converted policy with transformers, layer by layer and on log-probs; a difference ends the run "
        "(exit code 4).",
    )


class DataSection(Section):
    """The annotated answers."""

    annotated: str = result(..., "--annotated", "Rows with `prompt` and `response`, or `messages`: see docs/data.md.")
    held_out: str | None = result(None, "--held-out", "Held-out examples alike, evaluated after each iteration.")
    held_out_fraction: float = result(
        0.0,
        "--held-out-fraction",
        "Share of --annotated to hold out instead, chosen by a hash of each prompt: rows that are added move none.",
        ge=0,
        lt=1,
    )
    split_seed: int = result(0, None, "Key of the hash that chooses what is held out.", ge=0)
    prompt_column: str = result("prompt", "--prompt-column", "Column of the prompt; `a.b` and `a.0` reach into it.")
    response_column: str = result("response", "--response-column", "Column of the annotated response.")
    messages_column: str | None = result("messages", "--messages-column", "Column of conversations; null: none.")
    system_column: str | None = result("system", "--system-column", "Column of a system text, if any; null: none.")
    id_column: str = result("id", "--id-column", "Column of an example's id; where `id` is absent, the line's number.")
    turns: Turns = result(
        "last",
        "--turns",
        "Assistant messages of a conversation that are responses, each with all before it as its prompt.",
    )
    template: str = result(
        PAPER_TEMPLATE, "--template", "Text around `{prompt}`, or `chat` for the tokenizer's own chat template."
    )
    template_date: str | None = result(
        None, None, "Date, as 2026-01-31, for a chat template that asks for today's [that of the run's first start]."
    )
    closing_token: str | None = result(
        None, None, "Text of the token that closes an annotated response [as tokenizer, configs and template say]."
    )
    seq_length: int = result(2048, "--seq-length", "Most tokens of a prompt and one response together.", ge=8)
    over_long: Literal["refuse", "drop", "truncate"] = result(
        "refuse", "--over-long", "What to do with an annotated response that does not fit into --seq-length."
    )
    tokenizer_threads: int = execution(2, "--tokenizer-threads", "Threads that tokenize.", ge=1)

    @field_validator("template_date")
    @classmethod
    def _template_date_is_one(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                datetime.date.fromisoformat(value)
            except ValueError as error:
                raise ValueError(f"template_date = {value!r} is no date; write it as 2026-01-31") from error
        return value

    @property
    def has_held_out(self) -> bool:
        """Whether there are held-out examples."""
        return self.held_out is not None or self.held_out_fraction > 0

    @model_validator(mode="after")
    def _held_out_comes_from_one_place(self) -> "DataSection":
        if self.held_out is not None and self.held_out_fraction > 0:
            raise ValueError("held_out and held_out_fraction are two ways to hold examples out; keep one of them")
        return self

    @model_validator(mode="after")
    def _template_has_one_prompt(self) -> "DataSection":
        if self.template != CHAT_TEMPLATE and self.template.count("{prompt}") != 1:
            raise ValueError(f"template must be `{CHAT_TEMPLATE}` or contain {{prompt}} exactly once")
        return self


class ObjectiveSection(Section):
    """What a step minimises (paper, equations 1, 3, 7 and 9)."""

    method: Method = result("tspin", "--tspin-method", "Objective of the run.")
    link: Literal["logistic", "exponential"] = result(
        "logistic", "--tspin-link", "l(x): log(1 + exp(-x)), the paper's, or exp(-x)."
    )
    alpha: float = result(1.0, "--tspin-alpha", "Scale of the log-prob advantages (tspin, tspin_ref).", gt=0)
    beta: float = result(0.1, "--tspin-beta", "Weight of the historical advantage (tspin, tspin_ref).", ge=0)
    first_iteration_beta: float = result(
        0.0, "--tspin-first-iteration-beta", "beta of iteration 0, where y' and y0 come from the same policy.", ge=0
    )
    spin_lambda: float = result(0.1, "--tspin-spin-lambda", "Scale of the log-ratio margin (spin).", gt=0)
    nll_weight: float = result(
        0.0, "--tspin-nll-weight", "Weight of an extra -log pi(y) per annotated token; not part of the paper.", ge=0
    )

    @property
    def margin_scale(self) -> float:
        """What turns a difference of log-probs into a margin; sft has none."""
        return self.spin_lambda if self.method == "spin" else self.alpha


class OptimizerSection(Section):
    """The optimizer and its learning-rate schedule, restarted in every self-play iteration."""

    optimizer: Literal["rmsprop", "adam"] = result("rmsprop", "--optimizer", "rmsprop (the paper's) or adam (AdamW).")
    lr: float = result(5e-7, "--lr", "Peak learning rate.", gt=0)
    lr_by_iteration: list[float] = result(
        [],
        "--tspin-lr-by-iteration",
        "Peak learning rate of iteration 0, 1, ... (the last one repeats); overrides --lr.",
    )
    min_lr: float = result(0.0, "--min-lr", "Learning rate at the end of the decay.", ge=0)
    lr_decay_style: Literal["linear", "cosine", "constant"] = result(
        "linear", "--lr-decay-style", "Shape of the decay."
    )
    lr_warmup_fraction: float = result(
        0.1, "--lr-warmup-fraction", "Share of an iteration's steps with a rising learning rate.", ge=0, lt=1
    )
    weight_decay: float = result(0.0, "--weight-decay", "Decoupled weight decay; norms have none.", ge=0)
    clip_grad: float = result(1.0, "--clip-grad", "Largest global gradient norm; 0 does not clip.", ge=0)
    rmsprop_smoothing: float = result(0.99, None, "Decay of RMSProp's mean square (torch's `alpha`).", gt=0, lt=1)
    adam_beta1: float = result(0.9, "--adam-beta1", "AdamW's first moment decay.", ge=0, lt=1)
    adam_beta2: float = result(0.95, "--adam-beta2", "AdamW's second moment decay.", ge=0, lt=1)
    eps: float = result(1e-8, "--adam-eps", "Added to the root of the mean square.", gt=0)

    @model_validator(mode="after")
    def _learning_rates_fall(self) -> "OptimizerSection":
        peaks = self.lr_by_iteration or [self.lr]
        if not all(0 < peak < float("inf") for peak in peaks):
            raise ValueError(f"learning rates must be positive and finite, found {peaks}")
        if self.min_lr > min(peaks):
            raise ValueError(f"min_lr ({self.min_lr}) must not exceed the lowest peak learning rate ({min(peaks)})")
        return self

    def peak_lr(self, iteration: int) -> float:
        """Peak learning rate of a self-play iteration."""
        if not self.lr_by_iteration:
            return self.lr
        return self.lr_by_iteration[min(iteration, len(self.lr_by_iteration) - 1)]


class TrainingSection(Section):
    """One self-play iteration of training. Batch sizes count triplets."""

    micro_batch_size: int = execution(
        4,
        "--micro-batch-size",
        "Triplets in one forward pass of one replica with padded rows; with packed rows it only sets how long a row "
        "may be, see --tspin-row-capacity.",
        ge=1,
    )
    global_batch_size: int = result(64, "--global-batch-size", "Triplets in one optimizer step.", ge=1)
    epochs: int = result(1, "--tspin-epochs", "Passes over the triplets in one self-play iteration.", ge=1)
    train_iters: int | None = result(
        None, "--train-iters", "Optimizer steps of one self-play iteration; overrides --tspin-epochs.", ge=1
    )
    save_interval: int | None = execution(
        None, "--save-interval", "Steps between checkpoints inside an iteration. Default: only at its end.", ge=1
    )
    keep_checkpoints: int = execution(
        2,
        "--tspin-keep-checkpoints",
        "Checkpoints inside an iteration that are kept, the latest first; 0 keeps all until the iteration ends.",
        ge=0,
    )
    recompute_granularity: Literal["full", "selective"] | None = execution(
        None, "--recompute-granularity", "Recompute activations in backward: whole layers, or attention only."
    )
    layout: Literal["packed", "padded"] = execution(
        "packed",
        "--tspin-layout",
        "packed: whole triplets side by side in one long row a micro-batch; padded: a row a response, the reference.",
    )
    share_prompts: bool = execution(
        True, "--tspin-share-prompts", "Packed rows: a prompt goes through the policy once for all its responses."
    )
    row_capacity: int | None = execution(
        None,
        "--tspin-row-capacity",
        "Most tokens of a packed row, and so of a forward pass. Default: --seq-length times --micro-batch-size, and at "
        "least times 3, which holds any triplet; where that is short, up to 2048 or what a padded micro-batch has.",
        ge=8,
    )
    over_capacity: Literal["refuse", "truncate"] = result(
        "refuse",
        "--tspin-over-capacity",
        "What to do with a triplet that is longer than a packed row: stop, or cut its longest responses.",
    )
    packed_attention: Literal["auto", "segments", "flex", "thd", "dense"] = execution(
        "auto",
        "--tspin-packed-attention",
        "Attention over packed rows: segments (CPU), flex (FlexAttention on CUDA), thd (Transformer Engine's, where "
        "prompts are not shared), dense (a full mask, the reference); auto takes the device's own.",
    )
    data_order: Literal["balanced", "shuffled"] = result(
        "balanced",
        "--tspin-data-order",
        "balanced: every global batch has triplets of all lengths, drawn at random among alike ones; shuffled: at "
        "random from all.",
    )
    diagnostics: bool = report(
        False, "--tspin-diagnostics", "Also measure entropy and top-1 agreement of the responses at every step."
    )
    tensorboard: bool = report(True, "--tspin-tensorboard", "Write TensorBoard events beside metrics.jsonl.")


class ParallelSection(Section):
    """Layout of the ranks that train. The number of processes is TP x CP x PP x DP."""

    tensor_model_parallel_size: int = execution(
        1, "--tensor-model-parallel-size", "TP: ranks that split each layer.", ge=1
    )
    pipeline_model_parallel_size: int = execution(
        1, "--pipeline-model-parallel-size", "PP: ranks that split the stack of layers.", ge=1
    )
    virtual_pipeline_model_parallel_size: int | None = execution(
        None,
        "--num-virtual-stages-per-pipeline-rank",
        "Groups of layers on each PP rank, passed through in turn, for a smaller pipeline bubble.",
        ge=2,
    )
    data_parallel_size: int = execution(1, "--tspin-data-parallel-size", "DP: replicas of the policy.", ge=1)
    context_parallel_size: int = execution(
        1, "--context-parallel-size", "CP: ranks that share each packed row, for long answers.", ge=1
    )
    expert_model_parallel_size: int = execution(
        1,
        "--expert-model-parallel-size",
        "EP: ranks that share out the experts of a sparse layer, of those among CP x DP.",
        ge=1,
    )
    sequence_parallel: bool = execution(
        False, "--sequence-parallel", "Split norms and dropout over TP along the sequence."
    )
    use_distributed_optimizer: bool = execution(
        False, "--use-distributed-optimizer", "Shard the optimizer's state over DP."
    )
    overlap_grad_reduce: bool = execution(
        False, "--overlap-grad-reduce", "Reduce gradients over DP while backward still runs."
    )
    overlap_param_gather: bool = execution(
        False,
        "--overlap-param-gather",
        "Gather updated parameters while forward already runs (distributed optimizer).",
    )
    cpu_threads: int = execution(1, "--tspin-cpu-threads", "Threads of each rank on a machine without CUDA.", ge=1)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        model_parallel = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        return model_parallel * self.context_parallel_size * self.data_parallel_size

    def row_length_multiple(self, tokens: int = 1) -> int:
        """What the length of every row has to be a multiple of; the one place that knows.

        Under context parallelism each rank holds two equal chunks of a row; under sequence parallelism TP splits those.

        Args:
            tokens: What the tokens that a rank holds have to be a multiple of (`PrecisionSection.tokens_multiple`).
        """
        context, tensor = self.context_parallel_size, self.tensor_model_parallel_size
        chunks = 2 * context if context > 1 else 1
        return math.lcm(_ROW_UNIT, chunks, context * (tensor if self.sequence_parallel else 1) * tokens)

    @property
    def num_virtual_stages(self) -> int:
        """Groups of layers that a rank holds."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def equal_rows(self) -> bool:
        """Whether all rows of a global batch have to be equally long.

        Pipelines exchange fixed shapes, and ranks that share experts the same number of tokens.
        """
        return self.pipeline_model_parallel_size > 1 or self.expert_model_parallel_size > 1

    @property
    def row_count_multiple(self) -> int:
        """What the number of rows of a replica has to be a multiple of: virtual stages take PP rows at a time."""
        return self.pipeline_model_parallel_size if self.num_virtual_stages > 1 else 1

    def whole_stages(self) -> "ParallelSection":
        """The same ranks with the layers of each in one piece, for stages that only read or write weights."""
        return self.model_copy(update={"virtual_pipeline_model_parallel_size": None})

    @model_validator(mode="after")
    def _options_have_what_they_need(self) -> "ParallelSection":
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("sequence_parallel needs tensor_model_parallel_size of 2 or more")
        if self.virtual_pipeline_model_parallel_size and self.pipeline_model_parallel_size == 1:
            raise ValueError("virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size of 2 or more")
        if self.context_parallel_size * self.data_parallel_size % self.expert_model_parallel_size:
            raise ValueError(
                f"expert_model_parallel_size of {self.expert_model_parallel_size} does not divide "
                f"context_parallel_size x data_parallel_size = {self.context_parallel_size * self.data_parallel_size}"
            )
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError("overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce")
        return self


class SelfPlaySection(Section):
    """The outer loop (Algorithm 1)."""

    iterations: int = setting(
        5, "--tspin-iterations", "Self-play iterations; a run may be given more later.", affects="extent", ge=1
    )
    keep_policies: int = execution(
        2,
        "--tspin-keep-policies",
        "Policies that are kept, the latest first, beside the initial one and the best on the held-out examples; "
        "0 keeps all.",
        ge=0,
    )


class EvaluationSection(Section):
    """What is measured on the held-out examples before the first and after each iteration."""

    scorer: str | None = result(
        None,
        "--tspin-scorer",
        "`path/to/file.py:function` or `package.module:function`, called with (record, response), returning 0..1.",
    )
    scorer_seconds: float = execution(60.0, None, "Most seconds that the scorer may take for one answer.", gt=0)
    greedy: bool = result(True, "--tspin-evaluate-greedy", "Score the most probable answers.")
    sampled: bool = result(True, "--tspin-evaluate-sampled", "Score answers sampled with the generation settings.")


def default_row_capacity(micro_batch_size: int, seq_length: int) -> int:
    """Tokens of a packed row that holds any triplet, before rounding to the layout's multiple.

    Each row pays for its Python and kernel launches. On the quickstart's model those are as much as 100 of its tokens,
    so a row of short sequences has up to `_LEAST_ROW` tokens, but no more than a padded micro-batch takes memory for.
    """
    padded = _MOST_ROLES * micro_batch_size * seq_length
    return max(max(micro_batch_size, _MOST_ROLES) * seq_length, min(padded, _LEAST_ROW))


class Config(Section):
    """A whole run."""

    run_dir: str = execution(..., "--run-dir", "Folder of the run; a run that was interrupted continues from it.")
    seed: int = result(1234, "--seed", "Seed of the data order and of every sampled response.", ge=0)
    model: ModelSection
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    precision: PrecisionSection = PrecisionSection()
    parallel: ParallelSection = ParallelSection()
    generation: GenerationSection = GenerationSection()
    self_play: SelfPlaySection = SelfPlaySection()
    evaluation: EvaluationSection = EvaluationSection()
    launch: LaunchSection = LaunchSection()

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        training = self.training
        if training.layout == "padded" and self.parallel.num_virtual_stages > 1:
            raise ValueError("virtual_pipeline_model_parallel_size needs training.layout = packed")
        if training.layout == "padded" and self.parallel.context_parallel_size > 1:
            raise ValueError("context_parallel_size above 1 needs training.layout = packed")
        if self.precision.fp8_param_gather and not self.parallel.use_distributed_optimizer:
            raise ValueError("precision.fp8_param_gather needs parallel.use_distributed_optimizer")
        if self._samples_elsewhere and self.precision.rescored_prompts == 0:
            raise ValueError(
                "generation.engine = vllm needs precision.rescored_prompts of 1 or more: what another engine says of "
                "its answers is scored again before they are trained on"
            )
        return self

    @property
    def _samples_elsewhere(self) -> bool:
        """Whether the answers that are trained on come from another engine than ours."""
        return self.generation.engine != "megatron" and self.objective.method != "sft"

    @property
    def rescores(self) -> bool:
        """Whether iterations start by scoring a sample of their responses again: for low precision, or an engine."""
        return self.precision.rescores or self._samples_elsewhere

    @property
    def bounds_drift(self) -> bool:
        """Whether an iteration is refused whose sampled answers have other log-probs than training computes."""
        return self._samples_elsewhere

    def check_batches(self) -> None:
        """Raises ValueError if the batches of an optimizer step do not fit together."""
        training, data_parallel = self.training, self.parallel.data_parallel_size
        per_pass = training.micro_batch_size * data_parallel
        if training.layout == "padded" and training.global_batch_size % per_pass:
            raise ValueError(
                f"training.global_batch_size ({training.global_batch_size}) must be a multiple of "
                f"micro_batch_size x data_parallel_size ({training.micro_batch_size} x {data_parallel})"
            )

    def check_generation(self) -> None:
        """Raises ValueError if a sequence has no room for a prompt beside what is generated."""
        if self.generation.max_new_tokens >= self.data.seq_length:
            raise ValueError(
                f"generation.max_new_tokens ({self.generation.max_new_tokens}) must be smaller than "
                f"data.seq_length ({self.data.seq_length}), which has to hold the prompt too"
            )

    @property
    def row_length_multiple(self) -> int:
        """What the length of every row has to be a multiple of."""
        return self.parallel.row_length_multiple(self.precision.tokens_multiple)

    @property
    def row_capacity(self) -> int:
        """Most tokens of a packed row."""
        training, multiple = self.training, self.row_length_multiple
        if training.row_capacity is not None:
            return training.row_capacity
        # Rounded up, as rows are cut down to their multiple and have to hold any triplet.
        return -(-default_row_capacity(training.micro_batch_size, self.data.seq_length) // multiple) * multiple

    def largest_layout(self) -> ParallelSection:
        """That of the stages with the most ranks."""
        return max(self.parallel, self.generation_layout(), key=lambda layout: layout.world_size)

    def generation_layout(self, folded: bool = True) -> ParallelSection:
        """The layout of the stages that only run the policy forward, over as many ranks as training has.

        With vLLM it is one rank, unless generation sets more.

        Args:
            folded: What generation does not set of PP and CP is 1, and DP larger in turn; otherwise PP is training's.
        """
        wanted, training = self.generation, self.parallel
        if wanted.engine == "vllm":  # ranks only hold the policy for export and scores; the servers have their own GPUs
            tp, pp, dp = 1, 1, 1
        else:
            tp = wanted.tensor_model_parallel_size or training.tensor_model_parallel_size
            pp = 1 if folded else training.pipeline_model_parallel_size
            dp = max(1, training.world_size // (tp * (wanted.pipeline_model_parallel_size or pp)))
        return ParallelSection(
            tensor_model_parallel_size=wanted.tensor_model_parallel_size or tp,
            pipeline_model_parallel_size=wanted.pipeline_model_parallel_size or pp,
            data_parallel_size=wanted.data_parallel_size or dp,
            cpu_threads=training.cpu_threads,
        )
