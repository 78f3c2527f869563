"""From the log-probs of the same responses under two number formats to what `precision.json` says.

A response's log-prob is a sum over its tokens, and so is the rounding error in it: independent errors of tokens grow
with the root of the length, a common bias with the length itself. T-SPIN's loss lives on differences of such sums, so
their noise is held against the size of the margins.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_tspin.records import Differences, MarginNoise, PrecisionNoise

Values = NDArray[np.float64]


def differences(found: Values, expected: Values, tokens: Values, ids: Sequence[str]) -> Differences:
    """Statistics of found - expected.

    Args:
        found: [n], in nats.
        expected: [n].
        tokens: Tokens that each value is a sum over, [n].
        ids: Prompt of each value.
    """
    errors = found - expected
    sizes = np.abs(errors)
    return Differences(
        count=len(errors),
        mean=float(errors.mean()),
        standard_deviation=float(errors.std()),
        mean_absolute=float(sizes.mean()),
        p95_absolute=float(np.quantile(sizes, 0.95)),
        largest_absolute=float(sizes.max()),
        largest_id=ids[int(sizes.argmax())],
        per_token_rms=float(np.sqrt((errors**2).sum() / tokens.sum())),
    )


def margin_noise(found: Values, expected: Values, tokens: Values, ids: Sequence[str]) -> MarginNoise:
    """The noise of margins, prompt by prompt, and how large they are themselves.

    Args:
        found: Margins under the training precision, [n].
        expected: Those in fp32.
        tokens: Tokens of both responses, [n].
        ids: The prompts.
    """
    noise = differences(found, expected, tokens, ids)
    median = float(np.median(np.abs(expected)))
    return MarginNoise(noise=noise, median_absolute=median, noise_share=share(noise.mean_absolute, median))


def share(part: float, median: float) -> float | None:
    """A typical error over the median margin; None where that is 0."""
    return part / median if median else None


def noise_scalars(noise: PrecisionNoise) -> dict[str, float]:
    """The figures to watch over iterations, by TensorBoard's names; what was not measured is left out."""
    margins = {"current": noise.current_margin, "historical": noise.historical_margin}
    values = {
        "precision/log_prob_noise": noise.log_prob.mean_absolute,
        "precision/log_prob_bias": noise.log_prob.mean,
        "precision/noise_per_token": noise.log_prob.per_token_rms,
        **{f"precision/{name}_margin_noise_share": item.noise_share for name, item in margins.items() if item},
        "precision/drift": noise.drift.mean_absolute if noise.drift else None,
        "precision/drift_share": noise.drift_share,
        "precision/engine_drift_per_token": noise.engine_drift.per_token_rms if noise.engine_drift else None,
    }
    return {name: value for name, value in values.items() if value is not None}
