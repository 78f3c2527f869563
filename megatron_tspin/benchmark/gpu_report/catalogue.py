"""The checks of the report: their order, their time limits, and what the table shows of them."""

from megatron_tspin.benchmark.gpu_report.check import Check

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
        ("prompts", "new_tokens", "tokens_per_second", "milliseconds", "low", "high", "first_seconds"),
    ),
    Check("gpu_tests", 'pytest -m "gpu or te"', 48, 46, ("outcome",)),
)
"""In the order in which they run. The limits add up to less than eight minutes."""

BY_NAME = {check.name: check for check in CHECKS}
