"""The settings of number formats; `precision` makes of them what megatron-core and the kernels want."""

from typing import Literal

from pydantic import model_validator

from megatron_tspin.config_section import Section, report, result

_IMPLEMENTED_BY = {
    "rowwise": "local",
    "delayed": "transformer_engine",
    "blockwise": "transformer_engine",
    "mxfp8": "transformer_engine",
}


class PrecisionSection(Section):
    """Number formats of training. Master weights, gradient sums, log-probs and the loss are fp32 in all of them."""

    bf16: bool = result(False, "--bf16", "Compute in bfloat16 with fp32 master weights; otherwise fp32.")
    transformer_impl: Literal["local", "transformer_engine"] = result(
        "local",
        "--transformer-impl",
        "Linear layers and norms: local (torch; FP8 through torch._scaled_mm, also on a CPU) or transformer_engine.",
    )
    fp8: Literal["e4m3", "hybrid"] | None = result(
        None,
        "--fp8-format",
        "Linear layers of the decoder in FP8: e4m3 throughout, or hybrid with e5m2 output gradients. Needs --bf16.",
    )
    fp8_recipe: Literal["tensorwise", "rowwise", "delayed", "blockwise", "mxfp8"] = result(
        "tensorwise",
        "--fp8-recipe",
        "Where FP8 scales come from: a tensor's own largest value (tensorwise), a row's or column's (rowwise, local "
        "only), earlier steps (delayed), 128 x 128 blocks (blockwise), 32 values (mxfp8, Blackwell); the last three "
        "with Transformer Engine only.",
    )
    fp8_margin: int = result(0, "--fp8-margin", "Scales leave 2 to this power of headroom.", ge=0, le=6)
    fp8_amax_history_len: int = result(1024, "--fp8-amax-history-len", "Steps that delayed scaling remembers.", ge=1)
    fp8_amax_compute_algo: Literal["max", "most_recent"] = result(
        "max", "--fp8-amax-compute-algo", "What delayed scaling takes of them."
    )
    num_layers_at_start_in_bf16: int = result(
        0, "--num-layers-at-start-in-bf16", "First layers that stay out of FP8; the head always does.", ge=0
    )
    num_layers_at_end_in_bf16: int = result(
        0, "--num-layers-at-end-in-bf16", "Last layers that stay out of FP8; the head always does.", ge=0
    )
    fp8_param_gather: bool = result(
        False,
        "--fp8-param-gather",
        "Keep and gather the parameters in FP8 (Transformer Engine, distributed optimizer).",
    )
    rescored_prompts: int = report(
        64,
        "--tspin-rescored-prompts",
        "Prompts rescored in fp32 when an iteration starts, to measure what bf16 or FP8, or another engine, does to "
        "log-probs; 0: none.",
        ge=0,
    )
    noise_warning: float = report(
        0.1,
        None,
        "The report warns where the typical error of a margin is over this share of the median margin.",
        gt=0,
    )

    @model_validator(mode="after")
    def _options_have_what_they_need(self) -> "PrecisionSection":
        engine = self.transformer_impl == "transformer_engine"
        if engine and not self.bf16:
            raise ValueError("transformer_impl = transformer_engine needs bf16")
        if self.fp8 is None:
            self._refuse_fp8_options()
            return self
        if not self.bf16:
            raise ValueError(
                f"fp8 = {self.fp8} needs bf16: master weights stay fp32, everything but FP8 layers is bf16"
            )
        needed = _IMPLEMENTED_BY.get(self.fp8_recipe, self.transformer_impl)
        if self.transformer_impl != needed:
            raise ValueError(f"fp8_recipe = {self.fp8_recipe} needs transformer_impl = {needed}")
        if self.fp8_recipe == "delayed" and self.num_bf16_layers:
            raise ValueError("fp8_recipe = delayed cannot keep first or last layers in bf16; take tensorwise")
        if self.fp8_param_gather and (not engine or self.fp8_recipe == "mxfp8"):
            raise ValueError(
                "fp8_param_gather needs transformer_impl = transformer_engine and another recipe than mxfp8"
            )
        if self.fp8_margin and engine and self.fp8_recipe != "delayed":
            raise ValueError(
                f"fp8_margin: Transformer Engine has none for fp8_recipe = {self.fp8_recipe}; leave it at 0"
            )
        return self

    def _refuse_fp8_options(self) -> None:
        if self.fp8_param_gather or self.num_bf16_layers:
            raise ValueError(
                "fp8_param_gather and num_layers_at_start_in_bf16 or _at_end_in_bf16 need fp8 (--fp8-format)"
            )

    @property
    def label(self) -> str:
        """The format of training in a few words."""
        if self.fp8 is None:
            return "bf16" if self.bf16 else "fp32"
        return f"FP8 {self.fp8} {self.fp8_recipe}"

    @property
    def num_bf16_layers(self) -> int:
        """Layers that stay out of FP8."""
        return self.num_layers_at_start_in_bf16 + self.num_layers_at_end_in_bf16

    @property
    def tokens_multiple(self) -> int:
        """What the number of tokens in a linear layer has to be a multiple of; for `row_length_multiple`.

        FP8 matrix products sum over the tokens for the weight gradient, and their kernels take multiples of 16 there;
        mxfp8 has a scale for each 32.
        """
        if self.fp8 is None:
            return 1
        return 32 if self.fp8_recipe == "mxfp8" else 16

    @property
    def features_multiple(self) -> int:
        """What each size of an FP8 weight on one TP rank has to be a multiple of."""
        return 32 if self.fp8_recipe == "mxfp8" else 16

    @property
    def rescores(self) -> bool:
        """Whether iterations start by measuring what the formats do to log-probs; in fp32 that is nothing."""
        return self.bf16 and self.rescored_prompts > 0

    def without_fp8(self) -> "PrecisionSection":
        """bf16 or fp32 as it is, by torch: how policies answer prompts and are evaluated."""
        return PrecisionSection(bf16=self.bf16)
