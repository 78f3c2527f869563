"""Packed rows of random triplets, and the log-probs of their tokens."""

import dataclasses
import random
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megatron_tspin.benchmark.gpu_report.policies import topology
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.objective.forward import run_rows
from megatron_tspin.objective.packing import Packing, Shape, plan_rows, work_model
from megatron_tspin.objective.roles import ROLES
from megatron_tspin.objective.rows import Rows, pack_row

PROMPT_TOKENS = (20, 100)
RESPONSE_TOKENS = (50, 400)
_CAPACITY = 4096


def draw_rows(shape: Architecture, triplets: int, seed: int = 0) -> tuple[list[Rows], Tensor]:
    """Random triplets in packed rows of up to 4096 tokens.

    Args:
        shape: Its vocabulary and the price of its work.
        triplets: How many.
        seed: Of lengths and tokens.

    Returns:
        The rows, and for each response token, row after row, the number of its response, int64 [tokens].
    """
    chance = random.Random(seed)
    lengths = [
        Shape(chance.randint(*PROMPT_TOKENS), tuple(chance.randint(*RESPONSE_TOKENS) for _ in ROLES))
        for _ in range(triplets)
    ]

    def ids(count: int) -> list[int]:
        return [chance.randrange(shape.vocab_size) for _ in range(count)]

    groups = [(ids(each.prompt), [ids(count) for count in each.responses]) for each in lengths]
    (planned,) = plan_rows(lengths, Packing(_CAPACITY, topology().row_length_multiple), work_model(shape))
    rows = [pack_row([groups[i] for i in row.members], row.length) for row in planned]
    before = accumulate((row.targets.num_responses for row in rows), initial=0)
    return rows, torch.cat([row.targets.response_index + first for row, first in zip(rows, before, strict=False)])


def token_log_probs(policy: PolicyModel, rows: Sequence[Rows]) -> Tensor:
    """Log-prob of each response token, fp32 [tokens], in the order of `draw_rows`; by the forward pass that trains."""
    policy.set_is_first_microbatch()  # megatron-core's schedules do it: FP8 weights are quantised with today's scales
    return torch.cat([run_rows(_by_token(row), policy) for row in rows])


def _by_token(row: Rows) -> Rows:
    """The same row with a response for each token."""
    count = len(row.targets.token_ids)
    targets = dataclasses.replace(row.targets, response_index=torch.arange(count), num_responses=count)
    return dataclasses.replace(row, targets=targets)
