"""The checks of the report: their order, their time limits, and what the table shows of them.

No torch here: the process that starts the checks must survive whatever they do to the device.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One check, a module of this package.

    Attributes:
        name: Of the module, and on the command line.
        title: One line for the table.
        limit: Seconds that all its cases may take on a GPU, start of the process included; more where earlier checks
            left some of theirs.
        case_limit: Seconds that one case may take; the ones behind it still run then.
        columns: Figures that the table shows. All of them are in the JSON file.
        across: Cases are named `row | column` and make one table row together.
        reduced_limit: Both limits of the reduced form.
    """

    name: str
    title: str
    limit: float
    case_limit: float
    columns: tuple[str, ...]
    across: bool = False
    reduced_limit: float = 120.0


_TIMES = ("milliseconds", "low", "high")

CHECKS = (
    Check("environment", "device, versions, measured peak rates", 25, 12, ("rate", "low", "high", "share_of_bf16")),
    Check(
        "te",
        "Transformer Engine's modules, and a policy in each format: relative errors against fp32",
        50,
        25,
        ("out", "input_gradient", "weight_gradient", "first_seconds"),
    ),
    Check(
        "parity",
        "log-probs against fp32 of the same weights: differences in nats, of responses and (t) of tokens",
        75,
        30,
        ("mean", "std", "p95", "max", "t_std", "t_max"),
        across=True,
    ),
    Check(
        "attention",
        "attention over packed rows: relative errors against float64; ms in bf16",
        45,
        25,
        ("out", "dq", "dk", "dv", "forward_ms", "milliseconds", "low", "high"),
    ),
    Check(
        "head",
        "the head alone, forward and backward: ms, and peak MiB above weight, input and gradients",
        55,
        25,
        ("milliseconds", "peak_mib"),
        across=True,
    ),
    Check(
        "step",
        "a training step, forward and backward, without the optimizer",
        135,
        50,
        ("triplets_per_second", "tokens_per_second", "tflops", "share_of_bf16", "peak_gib"),
        across=True,
    ),
    Check(
        "generation",
        "greedy answers of one batch",
        35,
        22,
        ("prompts", "new_tokens", "tokens_per_second", *_TIMES, "first_seconds"),
    ),
    Check("gpu_tests", 'pytest -m "gpu or te"', 48, 46, ("outcome",)),
)
"""In the order in which they run. The limits add up to less than eight minutes."""

BY_NAME = {check.name: check for check in CHECKS}


@dataclass(frozen=True)
class Meaning:
    """What a figure is.

    Attributes:
        unit: "" for a ratio or a text.
        what: One line.
    """

    unit: str
    what: str
