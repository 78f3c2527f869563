"""The metrics of an optimizer step, each declared once: what it means, and of which sums over a batch it is made.

From the fields of `StepMetrics` follow what the ranks sum (`SUMMED`), what becomes of the sums (`from_sums`), the lines
of `metrics.jsonl` and the curves of TensorBoard. What a micro-batch adds to a sum is computed in
`objective/step_sums.py`, under the sum's name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from megatron_tspin.records import Record


@dataclass(frozen=True)
class Quotient:
    """Declares a metric as one sum over the global batch divided by another."""

    by: str | None = "num_triplets"
    """The divisor: a sum, or a measured metric. None leaves the sum as it is."""
    of: str | None = None
    """The sum that is divided. None is the one that has the metric's name."""
    role: str | None = None
    """The response that it is about, or needs; it is None for methods that do not compute that response."""
    diagnostic: bool = False
    """Whether it is None unless the head measured entropy and top-1 agreement."""

    def value(self, name: str, values: Mapping[str, float]) -> float:
        """The metric `name`, from sums and measured metrics by name."""
        dividend = values[self.of or name]
        return dividend if self.by is None else dividend / values[self.by]


Mean = Annotated[float, Quotient()]
OfAnnotated = Annotated[float | None, Quotient(role="annotated")]
OfSynthetic = Annotated[float | None, Quotient(role="synthetic")]
OfProto = Annotated[float | None, Quotient(role="proto")]
PerTokenOfAnnotated = Annotated[float | None, Quotient(by="tokens_annotated", role="annotated", diagnostic=True)]
PerTokenOfSynthetic = Annotated[float | None, Quotient(by="tokens_synthetic", role="synthetic", diagnostic=True)]
PerTokenOfProto = Annotated[float | None, Quotient(by="tokens_proto", role="proto", diagnostic=True)]


class StepMetrics(Record):
    """One optimizer step. Means are over the triplets of the global batch; a role that was not computed is None.

    Fields without a `Quotient` are measured by the trainer.
    """

    iteration: int
    """Self-play iteration."""
    step: int
    """Optimizer step inside the iteration, from 1."""
    loss: Mean
    learning_rate: float
    grad_norm: float
    update_skipped: bool
    """True when no triplet was active, so that no update was made."""
    num_triplets: Annotated[int, Quotient(by=None)]
    log_prob_annotated: OfAnnotated
    log_prob_synthetic: OfSynthetic
    log_prob_proto: OfProto
    reward_annotated: OfAnnotated
    """Mean reward: alpha log pi (tspin), lambda (log pi - log pi_t) (spin), alpha (log pi - log pi_t) (tspin_ref)."""
    reward_synthetic: OfSynthetic
    reward_proto: OfProto
    tokens_annotated: OfAnnotated
    """Mean response length in tokens."""
    tokens_synthetic: OfSynthetic
    tokens_proto: OfProto
    current_advantage: OfSynthetic
    """Mean log pi(y) - log pi(y'), minus the references' difference where the method has a reference."""
    historical_advantage: OfProto
    """Mean log pi(y') - log pi(y0), likewise."""
    current_margin: OfSynthetic
    """Mean of the link function's argument, e.g. alpha times the current advantage."""
    active_share: OfSynthetic
    """Share of triplets whose scaled current margin is at most 5, so that the link function still has a slope."""
    mean_slope: OfSynthetic
    """Mean of sigmoid(-margin): the weight that the logistic link gives to a triplet."""
    identical_share: OfSynthetic
    """Share of triplets with y' = y, which the current advantage cannot teach anything."""
    tokens_per_second: Annotated[float, Quotient(of="tokens", by="seconds")]
    """Prompt and response tokens over all ranks, a prompt counted once a response whatever the layout of rows."""
    packing_efficiency: Annotated[float, Quotient(of="used", by="places")]
    """Share of the rows' places that are not padding."""
    prompt_share_saved: Annotated[float, Quotient(of="saved_prompt_tokens", by="prompt_tokens")]
    """Share of prompt tokens that never went through the policy, because the responses of a triplet share theirs."""
    entropy_annotated: PerTokenOfAnnotated
    """Mean entropy in nats of the distribution that predicts a response token; only with diagnostics."""
    entropy_synthetic: PerTokenOfSynthetic
    entropy_proto: PerTokenOfProto
    top_annotated: PerTokenOfAnnotated
    """Share of response tokens that were the most probable one; only with diagnostics."""
    top_synthetic: PerTokenOfSynthetic
    top_proto: PerTokenOfProto
    seconds: float

    @classmethod
    def from_sums(
        cls, sums: Mapping[str, float], roles: tuple[str, ...], measured: Mapping[str, Any], diagnostics: bool = False
    ) -> Self:
        """Divides the sums as the metrics declare.

        Args:
            sums: Those of `SUMMED` over the global batch, by name.
            roles: The roles that were computed; what is about another one is None.
            measured: The fields without a `Quotient`.
            diagnostics: Whether the head measured entropy and top-1 agreement.
        """
        fields = dict(measured)
        for name, quotient in QUOTIENTS.items():
            known = (quotient.role is None or quotient.role in roles) and (diagnostics or not quotient.diagnostic)
            fields[name] = quotient.value(name, {**sums, **measured}) if known else None
        return cls(**fields)


QUOTIENTS: Mapping[str, Quotient] = {
    name: item
    for name, field in StepMetrics.model_fields.items()
    for item in field.metadata
    if isinstance(item, Quotient)
}
"""The declaration of each metric that comes from sums, by its name."""

TEACHING = "teaching"
"""The sum that is no metric: the triplets that can move the policy at all. Where there are none, no update is made."""


def _summed() -> tuple[str, ...]:
    measured = StepMetrics.model_fields.keys() - QUOTIENTS.keys()
    parts = [part for name, item in QUOTIENTS.items() for part in (item.of or name, item.by)]
    return tuple(dict.fromkeys(part for part in (*parts, TEACHING) if part is not None and part not in measured))


SUMMED = _summed()
"""What a step sums over the triplets of its global batch, in this order."""
