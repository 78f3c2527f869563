"""The number formats that the report compares, by the names of its rows."""

from typing import Any

from megatron_tspin.config_precision import PrecisionSection

LOCAL_FP32 = "fp32"
LOCAL_BF16 = "bf16"
ENGINE_BF16 = "bf16 TE"

_ENGINE: dict[str, Any] = {"bf16": True, "transformer_impl": "transformer_engine"}


def _fp8(made: dict[str, Any], recipe: Any, kind: Any) -> PrecisionSection:
    return PrecisionSection(**made, fp8=kind, fp8_recipe=recipe)


FORMATS: dict[str, PrecisionSection] = {
    LOCAL_FP32: PrecisionSection(),
    LOCAL_BF16: PrecisionSection(bf16=True),
    ENGINE_BF16: PrecisionSection(**_ENGINE),
    **{
        f"FP8 TE {recipe} {kind}": _fp8(_ENGINE, recipe, kind)
        for recipe in ("tensorwise", "delayed", "blockwise")
        for kind in ("e4m3", "hybrid")
    },
    **{
        f"FP8 torch {recipe} {kind}": _fp8({"bf16": True}, recipe, kind)
        for recipe in ("tensorwise", "rowwise")
        for kind in ("e4m3", "hybrid")
    },
}
"""`local` layers by torch, and Transformer Engine's (TE)."""

TRAINED = (
    LOCAL_BF16,
    ENGINE_BF16,
    "FP8 TE tensorwise hybrid",
    "FP8 TE delayed hybrid",
    "FP8 torch tensorwise hybrid",
    "FP8 torch rowwise hybrid",
)
"""Those whose speed is measured."""
