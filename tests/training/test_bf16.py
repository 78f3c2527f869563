"""What bf16 training keeps in fp32, and what is lost where it does not: masters, gradient sums, log-probs."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.rank_pool import in_layout
from tests.training.trajectory import _trainer, for_method, make_config, triplets_of

STEPS, COPIES = 16, 64


def train(config: Any, keep_masters: bool) -> Any:
    """How far the weights (in bf16 their masters) move in some small steps: mean absolute distance from the start."""
    import torch

    with in_layout(config.parallel) as topology:
        trainer = _trainer(config, topology)
        parameters = list(trainer.ddp.module.parameters())
        start = [parameter.detach().float().clone() for parameter in parameters]
        batch = for_method(triplets_of(0), trainer.roles, with_reference=False)
        for _ in range(STEPS):
            trainer.done = 0  # the peak of the schedule
            trainer.train_step(batch)
            if not keep_masters:
                for parameter in parameters:
                    parameter.main_param.copy_(parameter.detach().float().view_as(parameter.main_param))
        now = [getattr(parameter, "main_param", parameter).detach().view_as(parameter) for parameter in parameters]
        moved = torch.stack([(after - before).abs().sum() for after, before in zip(now, start, strict=True)]).sum()
        return (moved / sum(before.numel() for before in start)).item()


def test_without_masters_small_steps_are_rounded_away(ranks: Any, tiny_checkpoint: Any) -> None:
    flags = {
        "optimizer.lr": 2e-6,
        "optimizer.eps": 1e-8,
        "optimizer.lr_warmup_fraction": 0.0,
        "optimizer.lr_decay_style": "constant",
    }
    exact = make_config(tiny_checkpoint("untied"), **flags)
    config = make_config(tiny_checkpoint("untied"), **flags, **{"precision.bf16": True})
    in_fp32 = ranks(1).run(train, exact, True)[0]
    kept, lost = (ranks(1).run(train, config, keep)[0] for keep in (True, False))
    assert kept == pytest.approx(in_fp32, rel=0.2)
    assert lost < 0.5 * in_fp32


def accumulate(config: Any, copies: int) -> Any:
    """The gradient of a batch of copies of one triplet, each in a row of its own."""
    import torch

    with in_layout(config.parallel) as topology:
        trainer = _trainer(config, topology)
        (triplet,) = for_method(triplets_of(0)[:1], trainer.roles, with_reference=False)
        trainer.forward_backward([triplet] * copies)
        return torch.cat([p.main_grad.flatten() for p in trainer.ddp.module.parameters()]).numpy()


def test_gradients_are_summed_in_fp32(ranks: Any, tiny_checkpoint: Any) -> None:
    import torch

    triplet = triplets_of(0)[0]
    tokens = len(triplet.prompt) + sum(len(response) - 1 for response in triplet.responses.values())
    capacity = max(8, -(-tokens // 8) * 8)
    assert capacity < 2 * tokens, "one copy a row"
    flags = {"precision.bf16": True, "training.row_capacity": capacity}
    config = make_config(tiny_checkpoint("untied"), **flags)
    once, often = (torch.from_numpy(ranks(1).run(accumulate, config, copies)[0]) for copies in (1, COPIES))
    assert once.norm() > 0

    def difference(found: Any) -> float:
        return ((found - once).norm() / once.norm()).item()

    assert difference(often) < 1e-5
    total = torch.zeros_like(once, dtype=torch.bfloat16)
    for _ in range(COPIES):
        total += once.bfloat16()
    assert difference(total.float() / COPIES) > 1e-2


def test_log_probs_of_long_responses_need_fp32() -> None:
    import torch

    from megatron_tspin.models.head import ResponseTargets, VocabularyShard, sequence_log_probs

    tokens, width, vocabulary = 400, 64, 512
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, width, generator=generator).bfloat16()
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.3).bfloat16()
    ids = torch.randint(0, vocabulary, (tokens,), generator=generator)
    alone: Any = SimpleNamespace(size=lambda: 1)
    targets = ResponseTargets(torch.arange(tokens), ids, torch.zeros(tokens, dtype=torch.int64), 1)
    ours = sequence_log_probs(hidden, weight, targets, VocabularyShard(0, vocabulary, vocabulary, alone)).item()
    exact = torch.log_softmax(hidden.double() @ weight.double().t(), -1).gather(1, ids[:, None]).sum().item()
    rounded = torch.log_softmax(hidden @ weight.t(), -1).gather(1, ids[:, None])[:, 0]
    total = torch.zeros((), dtype=torch.bfloat16)
    for value in rounded:
        total = total + value
    assert abs(ours - exact) < 1e-2
    assert abs(rounded.double().sum().item() - exact) > 0.1, "logits and log-sum-exp in bf16"
    assert abs(total.item() - exact) > 10.0, "and summed in bf16"
