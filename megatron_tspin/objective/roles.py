"""The responses of a triplet, and which of them a method computes."""

from megatron_tspin.config import Method

ROLES = ("annotated", "synthetic", "proto")
"""y, y', y0: the fixed order of a triplet's responses."""


def computed_roles(method: Method, beta: float) -> tuple[str, ...]:
    """The roles that carry weight in the loss; no other role is ever run through the policy.

    y0 enters T-SPIN only through the historical advantage (equation 7), so beta = 0 leaves it out.
    """
    if method == "sft":
        return ROLES[:1]
    if method == "spin" or beta == 0.0:
        return ROLES[:2]
    return ROLES


def stored_roles(method: Method) -> tuple[str, ...]:
    """The roles that a run of this method generates and stores as documents."""
    if method == "sft":
        return ROLES[:1]
    return ROLES[:2] if method == "spin" else ROLES


def has_reference(method: Method) -> bool:
    """Whether the loss compares the policy with the one that the iteration started from."""
    return method in ("spin", "tspin_ref")
