"""Trains a tiny policy for a few steps on ranks, under whatever layout, and in plain transformers as the judge."""

import random
from pathlib import Path
from typing import Any

from megatron_tspin.config import Config
from tests.rank_pool import in_layout
from tests.rounding import SMOOTH

NUM_STEPS = 5
NUM_TRIPLETS = 7  # not a multiple of anything: the global batch has an incomplete micro-batch


def make_config(folder: Path, **settings: Any) -> Config:
    """A run on a tiny checkpoint; settings by dotted name."""
    from megatron_tspin.config_source import load_config

    defaults: dict[str, Any] = {
        "run_dir": "unused",
        "model.hf_checkpoint": str(folder),
        "data.annotated": "unused",
        "data.seq_length": 64,
        "generation.max_new_tokens": 16,
        "objective.alpha": 0.1,
        "objective.beta": 0.3,
        **SMOOTH,
        "optimizer.clip_grad": 2.35,  # some steps are clipped, and some are not: clipping hides a wrong scale
        "training.micro_batch_size": 2,
        "training.row_capacity": 64,  # a few rows a step
        "training.global_batch_size": 8,
    }
    return load_config(None, {**defaults, **settings})


def triplets_of(step: int, vocabulary: int = 101) -> list[Any]:
    """Random triplets; the first has y' = y, the second a one-token response."""
    from megatron_tspin.objective.batches import Triplet
    from megatron_tspin.objective.roles import ROLES

    chance = random.Random(step)
    made = []
    for index in range(NUM_TRIPLETS):
        prompt = [chance.randrange(3, vocabulary) for _ in range(chance.randint(1, 12))]
        responses = {role: [chance.randrange(3, vocabulary) for _ in range(chance.randint(1, 10))] for role in ROLES}
        if index == 0:
            responses["synthetic"] = responses["annotated"]
        if index == 1:
            responses["proto"] = [5]
        reference = {role: -2.0 * len(response) for role, response in responses.items()}
        made.append(Triplet(f"{step}-{index}", prompt, responses, reference))
    return made


def for_method(triplets: list[Any], roles: tuple[str, ...], with_reference: bool) -> list[Any]:
    """Keeps what the method computes."""
    from megatron_tspin.objective.batches import Triplet

    return [
        Triplet(
            triplet.id,
            triplet.prompt,
            {role: triplet.responses[role] for role in roles},
            {role: triplet.reference[role] for role in roles} if with_reference else None,
        )
        for triplet in triplets
    ]


def train(config: Config, export: Path, stop_after: int | None = None) -> list[float]:
    """On ranks: trains NUM_STEPS steps, exports the weights, returns loss and gradient norm of each step.

    With `stop_after`, everything is saved after that many steps and a new trainer goes on from the files.
    """
    from megatron_tspin.checkpoint.hf_weights import export_hf
    from megatron_tspin.checkpoint.store import load_checkpoint, save_checkpoint

    with in_layout(config.parallel) as topology:
        trainer = _trainer(config, topology)
        losses = _steps(trainer, config, stop_after or NUM_STEPS)
        if stop_after is not None:
            saved = export.with_name(export.name + "_checkpoint")
            save_checkpoint(saved, trainer.whole_policy(), topology, trainer.optimizer, {"step": trainer.done})
            trainer = _trainer(config, topology)
            trainer.done = load_checkpoint(saved, trainer.ddp.module, topology, trainer.optimizer)["step"]
            losses += _steps(trainer, config, NUM_STEPS)
        (policy,) = trainer.whole_policy()
        export_hf(policy, topology, Path(config.model.hf_checkpoint), export)
        return losses


def gradients(config: Config, export: Path) -> list[float]:
    """On ranks: the gradient of the first global batch, exported as if it were the weights; returns the log-probs."""
    import torch

    from megatron_tspin.checkpoint.hf_weights import export_hf
    from megatron_tspin.objective.roles import has_reference
    from megatron_tspin.objective.scoring import score_pairs

    with in_layout(config.parallel) as topology:
        trainer = _trainer(config, topology)
        batch = for_method(triplets_of(0), trainer.roles, has_reference(config.objective.method))
        trainer.forward_backward(batch)
        policy = trainer.ddp.module
        log_probs = score_pairs(policy, topology, [pair for triplet in batch for pair in triplet.pairs()], 64)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.copy_(parameter.main_grad)
        export_hf(policy, topology, Path(config.model.hf_checkpoint), export)
        return log_probs


def _trainer(config: Config, topology: Any) -> Any:
    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.models.hf_config import read_architecture
    from megatron_tspin.models.provider import make_model_provider
    from megatron_tspin.platform import device
    from megatron_tspin.training.loop import build_trainer

    architecture = read_architecture(Path(config.model.hf_checkpoint))
    provider = make_model_provider(architecture, config.parallel, config.training, config.precision)
    model = provider(pre_process=topology.is_first_pipeline_stage, post_process=topology.is_last_pipeline_stage).to(
        device()
    )
    load_hf(model, topology)
    return build_trainer(config, 1, topology, model, NUM_STEPS)


def _steps(trainer: Any, config: Config, until: int) -> list[float]:
    from megatron_tspin.objective.roles import has_reference

    losses = []
    while trainer.done < until:
        batch = for_method(triplets_of(trainer.done), trainer.roles, has_reference(config.objective.method))
        metrics = trainer.train_step(batch)
        losses += [metrics.loss, metrics.grad_norm]  # RMSProp hides a wrong norm: it does not feel the clipping
    return losses


def weights(folder: Path) -> dict[str, Any]:
    """Tensors of an exported checkpoint."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_resumes_to_the_bit(pool: Any, config: Config, folder: Path) -> None:
    """Training that is stopped after three steps and continued from its files ends with the same losses and weights."""
    unbroken = pool.run(train, config, folder / "unbroken")[0]
    assert pool.run(train, config, folder / "resumed", 3)[0] == unbroken
    expected = weights(folder / "unbroken")
    for name, value in weights(folder / "resumed").items():
        assert value.equal(expected[name]), name


def train_plainly(config: Config) -> tuple[list[float], dict[str, Any]]:
    """The judge: transformers, one forward pass a response, the paper's formulas, torch's own RMSprop."""
    import torch
    import transformers

    from megatron_tspin.training.learning_rate import learning_rate

    model = transformers.AutoModelForCausalLM.from_pretrained(config.model.hf_checkpoint, dtype=torch.float32).eval()
    settings = config.optimizer
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1.0, alpha=settings.rmsprop_smoothing, eps=settings.eps)
    losses = []
    for step in range(NUM_STEPS):
        triplets = triplets_of(step)
        loss = sum(plain_loss(config, model, triplet) for triplet in triplets) / len(triplets)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        optimizer.param_groups[0]["lr"] = learning_rate(step, NUM_STEPS, settings.lr, settings)
        optimizer.step()
        losses += [loss.item(), norm.item()]
    return losses, as_in_files(model, {name: value.detach() for name, value in model.named_parameters()})


def plain_gradients(config: Config) -> tuple[list[float], dict[str, Any]]:
    """The judge's log-probs and gradient of the first global batch."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(config.model.hf_checkpoint, dtype=torch.float32).eval()
    triplets = triplets_of(0)
    log_probs = [
        plain_log_prob(model, t.prompt, response).item() for t in triplets for response in t.responses.values()
    ]
    (sum(plain_loss(config, model, triplet) for triplet in triplets) / len(triplets)).backward()
    return log_probs, as_in_files(model, {name: value.grad for name, value in model.named_parameters()})


def as_in_files(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors of transformers' model, under the names and in the shapes that checkpoints have."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Any] = revert_weight_conversion(model, tensors)
    return found


def plain_loss(config: Config, model: Any, triplet: Any) -> Any:
    """Equations 1, 3, 7 and 9 as the paper writes them."""
    from torch.nn.functional import logsigmoid

    objective = config.objective
    y, y1, y0 = (plain_log_prob(model, triplet.prompt, response) for response in triplet.responses.values())
    t, t1, t0 = triplet.reference.values()
    if objective.method == "sft":
        return -y
    if objective.method == "spin":
        return -logsigmoid(objective.spin_lambda * ((y - t) - (y1 - t1)))
    if objective.method == "tspin":
        u, v = y - y1, y1 - y0
    else:
        u, v = (y - t) - (y1 - t1), (y1 - t1) - (y0 - t0)
    if objective.link == "exponential":
        return (-objective.alpha * u).exp() + objective.beta * (-objective.alpha * v).exp()
    return -logsigmoid(objective.alpha * u) - objective.beta * logsigmoid(objective.alpha * v)


def plain_log_prob(model: Any, prompt: list[int], response: list[int]) -> Any:
    """log pi(response given prompt) by a forward pass over both."""
    import torch

    ids = torch.tensor([[*prompt, *response]])
    log_probs = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], dim=-1)
    return log_probs.gather(1, torch.tensor(response)[:, None]).sum()
