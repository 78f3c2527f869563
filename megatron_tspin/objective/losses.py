"""The objectives as pure functions of role-wise sequence log-probs.

Symbols: y annotated, y' synthetic, y0 proto; log pi is the sum of token log-probs over a response; pi_t is the policy
that the self-play iteration started from. Every function returns one value per triplet, never a mean: the caller
divides the sum by the triplets of the global batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tspin.config import ObjectiveSection

ACTIVE_MARGIN = 5.0
"""A scaled margin above this leaves the logistic link a slope under 0.7 %: the triplet teaches next to nothing."""


@dataclass(frozen=True)
class TripletLosses:
    """Per-triplet results, each fp32 [n]; None where the method has no such quantity."""

    loss: Tensor
    rewards: Mapping[str, Tensor]
    """By role: alpha * log pi, or scale * (log pi - log pi_t) for methods with a reference."""
    current_margin: Tensor | None = None
    """The current term's argument of the link function."""
    historical_margin: Tensor | None = None


def link_loss(margin: Tensor, link: str) -> Tensor:
    """l(x): log(1 + exp(-x)) for "logistic", exp(-x) for "exponential"; both decrease."""
    if link == "logistic":
        return F.softplus(-margin)
    return torch.exp(-margin)


def tspin_loss(rewards: Mapping[str, Tensor], beta: float, link: str) -> TripletLosses:
    """Equation 7: l(r(y) - r(y')) + beta * l(r(y') - r(y0)), with rewards r(z) = alpha * log pi(z).

    Equation 9 (T-SPIN-ref) is the same with r(z) = alpha * (log pi(z) - log pi_t(z)).

    Args:
        rewards: By role, fp32 [n]. With beta = 0 the proto reward may be absent.
        beta: Weight of the historical advantage.
        link: "logistic" or "exponential".
    """
    current = rewards["annotated"] - rewards["synthetic"]
    loss = link_loss(current, link)
    historical = rewards["synthetic"] - rewards["proto"] if "proto" in rewards else None
    if beta and historical is not None:
        loss = loss + beta * link_loss(historical, link)
    return TripletLosses(loss, rewards, current, historical)


def spin_loss(rewards: Mapping[str, Tensor], link: str) -> TripletLosses:
    """Equation 3: l(r(y) - r(y')), with rewards r(z) = lambda * (log pi(z) - log pi_t(z))."""
    current = rewards["annotated"] - rewards["synthetic"]
    return TripletLosses(link_loss(current, link), rewards, current)


def sft_loss(rewards: Mapping[str, Tensor]) -> TripletLosses:
    """Equation 1: -log pi(y), summed over the response's tokens; the reward is log pi itself."""
    return TripletLosses(-rewards["annotated"], rewards)


def triplet_losses(
    objective: ObjectiveSection,
    beta: float,
    log_probs: Mapping[str, Tensor],
    reference: Mapping[str, Tensor] | None,
    annotated_tokens: Tensor,
) -> TripletLosses:
    """The configured objective.

    Args:
        objective: Method, link and scales.
        beta: Of this self-play iteration.
        log_probs: log pi by role, fp32 [n].
        reference: log pi_t by role, fp32 [n], for the methods that have one.
        annotated_tokens: Response length of y, [n], for the optional NLL term.
    """
    if objective.method == "sft":
        return sft_loss(log_probs)
    scale = objective.margin_scale
    rewards = {role: scale * (value - (reference[role] if reference else 0.0)) for role, value in log_probs.items()}
    if objective.method == "spin":
        losses = spin_loss(rewards, objective.link)
    else:
        losses = tspin_loss(rewards, beta, objective.link)
    if not objective.nll_weight:
        return losses
    nll = -log_probs["annotated"] / annotated_tokens
    return TripletLosses(
        losses.loss + objective.nll_weight * nll, rewards, losses.current_margin, losses.historical_margin
    )
