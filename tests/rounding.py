"""How far two ways of computing the same thing may lie apart: by fp32 rounding, on every processor, and by no fault.

The kernels that a processor gets decide in which order sums are made, and so which of their last bits they have. Each
bound follows from that, with room, and holds for a quantity that does not magnify rounding:

log-prob  Relative. Two fp32 models round a logit in their own ways; the product's promise is 5e-6.
loss      Relative. It is made of differences of log-probs, which may be ten times as large as itself.
norm      Relative, of a gradient's norm. Near saturation the weight of a triplet moves with its margin, whose error is
          that of log-probs many times as large.
gradient  Norm of the difference over the gradient's norm, a tensor at a time. fp32 sums of n terms are off by some
          sqrt(n) 2^-24, and a gradient has gone through a few layers of them.
update    Norm of the difference over the norm of `final - initial`. A weight rounds once a step, by up to 2^-24 of
          itself: five steps over updates of 2e-3 of the weights and more are 1.5e-4 if all of them round one way.
          Gradients add theirs, as long as the optimizer does not magnify it. RMSProp does: it divides by the root of a
          mean square, so that of a gradient far above `eps` only the sign is left, and a component that is nothing but
          rounding becomes a full step. Trajectories that are compared are therefore made with `SMOOTH`, whose eps is of
          the gradients' size. That also lets a wrong scale of gradients be seen, which RMSProp hides otherwise.

With TSPIN_TEST_ROUNDING=FILE each comparison appends its kind and share of the bound; `tests.processors` shows them.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

RECORD = "TSPIN_TEST_ROUNDING"
BOUNDS = {"log-prob": 2e-6, "loss": 3e-5, "norm": 1e-4, "gradient": 1e-5, "update": 3e-4}
SMOOTH = {"optimizer.eps": 1e-3, "optimizer.lr": 1e-3}
"""Settings of the optimizer under which an update is about proportional to its gradient."""


def within(kind: str, error: float, what: str = "", bound: float | None = None) -> None:
    """Asserts that a difference is one of rounding.

    Args:
        kind: Of `BOUNDS`.
        error: In the bound's own measure.
        what: The compared thing, for the message.
        bound: A narrower one than the kind's.
    """
    bound = bound or BOUNDS[kind]
    if path := os.environ.get(RECORD):
        with open(path, "a") as stream:
            stream.write(json.dumps([kind, error / bound]) + "\n")
    assert error <= bound, f"{what or kind}: off by {error:.2e}, the bound is {bound:.0e}"


def all_within(kind: str, found: Sequence[float], expected: Sequence[float], bound: float | None = None) -> None:
    """Asserts that two lists of numbers are relatively the same; `kind` is `log-prob`, `loss` or `norm`."""
    assert len(found) == len(expected)
    within(kind, max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)), bound=bound)


def same_gradients(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Asserts that the gradients of all tensors are the same."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        within("gradient", _distance(found[name], value) / _norm(value), name)


def same_updates(found: Mapping[str, Any], expected: Mapping[str, Any], initial: Mapping[str, Any]) -> None:
    """Asserts that all tensors came from `initial` to the same place.

    Args:
        found: Weights by name, torch or numpy.
        expected: Those of the judge.
        initial: Where both started. A tensor that hardly moved would compare its own rounding.
    """
    assert set(found) == set(expected) == set(initial)
    for name, value in expected.items():
        moved = _distance(value, initial[name])
        assert moved > 1e-3 * _norm(value), f"{name} was hardly trained: it moved by {moved / _norm(value):.1e}"
    errors = update_errors(found, expected, initial)
    worst = max(errors, key=errors.__getitem__)
    within("update", errors[worst], worst)


def update_errors(
    found: Mapping[str, Any], expected: Mapping[str, Any], initial: Mapping[str, Any]
) -> dict[str, float]:
    """Norm of the difference over the norm of the expected update, by tensor."""
    return {name: _distance(found[name], value) / _distance(value, initial[name]) for name, value in expected.items()}


def _distance(one: Any, other: Any) -> float:
    return _norm(one - other)


def _norm(tensor: Any) -> float:
    return float((tensor**2).sum() ** 0.5)
