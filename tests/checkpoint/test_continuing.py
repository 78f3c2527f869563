"""What an optimizer cannot continue from is refused by name."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tspin.errors import InputError

FOLDER = Path("run/step_00000003")
BOTH, SECOND = ["exp_avg", "exp_avg_sq"], ["exp_avg_sq"]


def check(momentum: float, bf16: bool, facts: dict[str, Any] | None) -> None:
    """On a rank, which alone imports megatron-core."""
    from megatron_tspin.checkpoint.optimizer_state import check_continues

    inner = SimpleNamespace(param_groups=[{"betas": (momentum, 0.99)}])
    optimizer = SimpleNamespace(
        config=SimpleNamespace(bf16=bf16), chained_optimizers=[SimpleNamespace(optimizer=inner)]
    )
    check_continues(FOLDER, optimizer, facts)


@pytest.mark.parametrize(
    ("momentum", "bf16", "facts", "message"),
    [
        (0.9, False, {"master_weights": False, "moments": SECOND}, "has no exp_avg; keep --optimizer as it was"),
        (0.0, False, {"master_weights": True, "moments": SECOND}, "saved in bf16 and cannot continue in fp32"),
        (0.0, True, {"master_weights": False, "moments": SECOND}, "saved in fp32 and cannot continue in bf16"),
        (0.0, False, None, "holds no optimizer state"),
    ],
)
def test_what_does_not_fit_is_refused(momentum: float, bf16: bool, facts: Any, message: str, ranks: Any) -> None:
    with pytest.raises(InputError, match=f"{FOLDER}: .*{message}"):
        ranks(1).run(check, momentum, bf16, facts)


@pytest.mark.parametrize(
    ("momentum", "moments"), [(0.9, BOTH), (0.0, SECOND), (0.0, BOTH)], ids=["adam", "rmsprop", "rmsprop from more"]
)
def test_what_fits_is_taken(momentum: float, moments: list[str], ranks: Any) -> None:
    ranks(1).run(check, momentum, False, {"master_weights": False, "moments": moments})


def test_a_checkpoint_from_before_moments_were_named_is_taken(ranks: Any) -> None:
    ranks(1).run(check, 0.9, False, {"master_weights": False})
