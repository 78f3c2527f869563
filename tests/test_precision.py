"""The settings of number formats: what is refused, and what they come to for megatron-core and our own layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from megatron_tspin.config import Config, ParallelSection
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.config_source import load_config
from megatron_tspin.errors import InputError
from megatron_tspin.models.architecture import Architecture, LayerFacts, Norm
from megatron_tspin.precision import TorchFp8, check_machine, core_fields, describe, in_fp8, torch_fp8
from megatron_tspin.report.headline import describe_objective

ENGINE = {"bf16": True, "transformer_impl": "transformer_engine"}
FP8 = {"bf16": True, "fp8": "hybrid"}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"fp8": "hybrid"}, "fp8 = hybrid needs bf16"),
        ({"transformer_impl": "transformer_engine"}, "transformer_impl = transformer_engine needs bf16"),
        ({**ENGINE, "fp8": "e4m3", "fp8_recipe": "rowwise"}, "rowwise needs transformer_impl = local"),
        ({**FP8, "fp8_recipe": "delayed"}, "delayed needs transformer_impl = transformer_engine"),
        ({**FP8, "fp8_recipe": "blockwise"}, "blockwise needs transformer_impl = transformer_engine"),
        ({**FP8, "fp8_recipe": "mxfp8"}, "mxfp8 needs transformer_impl = transformer_engine"),
        (
            {**ENGINE, "fp8": "e4m3", "fp8_recipe": "delayed", "num_layers_at_end_in_bf16": 1},
            "delayed cannot keep first or last layers in bf16",
        ),
        ({**FP8, "fp8_param_gather": True}, "fp8_param_gather needs transformer_impl = transformer_engine"),
        ({**ENGINE, "fp8": "e4m3", "fp8_recipe": "mxfp8", "fp8_param_gather": True}, "another recipe than mxfp8"),
        ({**ENGINE, "fp8": "e4m3", "fp8_margin": 1}, "Transformer Engine has none for fp8_recipe = tensorwise"),
        ({"bf16": True, "fp8_param_gather": True}, "need fp8"),
        ({"bf16": True, "num_layers_at_start_in_bf16": 1}, "need fp8"),
    ],
)
def test_impossible_combinations_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        PrecisionSection(**settings)


def run(**flags: Any) -> Config:
    needed = {"run_dir": "r", "model.hf_checkpoint": "h", "data.annotated": "a"}
    return load_config(None, needed | {name.replace("__", "."): value for name, value in flags.items()})


def test_fp8_parameters_need_the_distributed_optimizer() -> None:
    wanted = {f"precision__{name}": value for name, value in {**ENGINE, "fp8": "e4m3"}.items()}
    with pytest.raises(InputError, match="needs parallel.use_distributed_optimizer"):
        run(**wanted, precision__fp8_param_gather=True)
    run(**wanted, precision__fp8_param_gather=True, parallel__use_distributed_optimizer=True)


@pytest.mark.parametrize(
    ("precision", "parallel", "multiple"),
    [
        ({}, {}, 8),
        (FP8, {}, 16),
        ({**ENGINE, "fp8": "e4m3", "fp8_recipe": "mxfp8"}, {}, 32),
        (FP8, {"context_parallel_size": 2}, 32),
        (FP8, {"tensor_model_parallel_size": 3, "sequence_parallel": True}, 48),
        (FP8, {"tensor_model_parallel_size": 3}, 16),
    ],
)
def test_rows_have_as_many_tokens_as_kernels_need(
    precision: dict[str, Any], parallel: dict[str, Any], multiple: int
) -> None:
    flags = {f"precision__{name}": value for name, value in precision.items()}
    flags |= {f"parallel__{name}": value for name, value in parallel.items()}
    assert run(**flags).row_length_multiple == multiple


def test_fields_of_megatron_core() -> None:
    assert core_fields(PrecisionSection())["params_dtype"] == torch.float32
    assert core_fields(PrecisionSection(**FP8)) == core_fields(PrecisionSection(bf16=True))
    fields = core_fields(PrecisionSection(**ENGINE, fp8="e4m3", fp8_recipe="blockwise", num_layers_at_end_in_bf16=2))
    assert (fields["fp8"], fields["fp8_recipe"], fields["first_last_layers_bf16"]) == ("e4m3", "blockwise", True)
    assert (fields["num_layers_at_start_in_bf16"], fields["num_layers_at_end_in_bf16"]) == (0, 2)
    assert fields["params_dtype"] == fields["pipeline_dtype"] == torch.bfloat16


def test_settings_of_our_own_layers() -> None:
    assert torch_fp8(PrecisionSection(bf16=True)) is None
    assert torch_fp8(PrecisionSection(**ENGINE, fp8="e4m3")) is None
    hybrid = torch_fp8(PrecisionSection(**FP8, fp8_recipe="rowwise", fp8_margin=1))
    assert hybrid == TorchFp8(torch.float8_e4m3fn, torch.float8_e5m2, rowwise=True, margin=1)
    one = torch_fp8(PrecisionSection(bf16=True, fp8="e4m3"))
    assert one == TorchFp8(torch.float8_e4m3fn, torch.float8_e4m3fn, rowwise=False, margin=0)


def test_first_and_last_layers_stay_out() -> None:
    precision = PrecisionSection(**FP8, num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=2)
    assert [in_fp8(precision, layer, 5) for layer in range(5)] == [False, True, True, False, False]
    assert not in_fp8(PrecisionSection(bf16=True), 0, 1)


def test_policies_answer_without_fp8() -> None:
    assert PrecisionSection(**ENGINE, fp8="e4m3", fp8_recipe="delayed", fp8_margin=2).without_fp8() == PrecisionSection(
        bf16=True
    )


def architecture(**sizes: int) -> Architecture:
    values = {"hidden_size": 64, "ffn_hidden_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, **sizes}
    return Architecture(
        family="llama", vocab_size=100, layers=(LayerFacts(),) * 2, norm=Norm("rms", 1e-5), tied_embeddings=True,
        max_positions=64, ropes=(), softmax_scale=0.25, folder=Path("checkpoint"), **values,
    )  # fmt: skip


def test_sizes_that_fp8_does_not_take_are_refused_by_name() -> None:
    precision = PrecisionSection(**FP8)
    architecture().check_precision(ParallelSection(tensor_model_parallel_size=2), precision)
    architecture(ffn_hidden_size=100).check_precision(ParallelSection(), PrecisionSection(bf16=True))
    with pytest.raises(InputError, match="columns of the MLP on a TP rank of checkpoint is 100 at") as raised:
        architecture(ffn_hidden_size=100, hidden_size=72).check_precision(ParallelSection(), precision)
    assert "hidden_size of checkpoint is 72" in str(raised.value)
    with pytest.raises(InputError, match="is 24 at tensor_model_parallel_size = 4; .* or lower"):
        architecture().check_precision(ParallelSection(tensor_model_parallel_size=4), precision)
    with pytest.raises(InputError, match="= 2 leave none of the 2 layers of checkpoint in FP8"):
        architecture().check_precision(ParallelSection(), PrecisionSection(**FP8, num_layers_at_start_in_bf16=2))


def test_mxfp8_takes_multiples_of_32() -> None:
    mxfp8 = PrecisionSection(**ENGINE, fp8="e4m3", fp8_recipe="mxfp8")
    with pytest.raises(InputError, match="multiples of 32: columns of the MLP on a TP rank of checkpoint is 48"):
        architecture(ffn_hidden_size=48).check_precision(ParallelSection(), mxfp8)


def test_the_engine_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    check_machine(PrecisionSection(**FP8))
    with pytest.raises(InputError, match="needs a CUDA device.*--transformer-impl local"):
        check_machine(PrecisionSection(**ENGINE))


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tspin.precision.has_cuda", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Some GPU")
    monkeypatch.setattr("megatron_tspin.precision.find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    with pytest.raises(InputError, match=r"capability 8.9; Some GPU has 8.0: leave --fp8-format out"):
        check_machine(PrecisionSection(**FP8))
    check_machine(PrecisionSection(bf16=True))
    with pytest.raises(InputError, match="is not installed; install `megatron_tspin"):
        check_machine(PrecisionSection(**ENGINE))
    monkeypatch.setattr("megatron_tspin.precision.find_spec", lambda name: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    with pytest.raises(InputError, match=r"capability 10.0; Some GPU has 9.0: take another --fp8-recipe"):
        check_machine(PrecisionSection(**ENGINE, fp8="e4m3", fp8_recipe="mxfp8"))
    check_machine(PrecisionSection(**ENGINE, fp8="e4m3"))
    monkeypatch.setattr("torch.version.cuda", "12.8")
    with pytest.raises(InputError, match=r"blockwise needs a torch of CUDA 12.9; this one is of 12.8"):
        check_machine(PrecisionSection(**ENGINE, fp8="e4m3", fp8_recipe="blockwise"))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    check_machine(PrecisionSection(**ENGINE, fp8="e4m3", fp8_recipe="blockwise"))


def test_one_line_for_the_log() -> None:
    assert describe(PrecisionSection()) == "fp32, linear layers by torch"
    text = describe(PrecisionSection(**FP8, num_layers_at_start_in_bf16=1))
    assert "FP8 (hybrid, tensorwise scaling) by torch, first 1 and last 0 layers in bf16" in text


def test_a_few_words_for_the_report() -> None:
    assert PrecisionSection().label == "fp32"
    assert PrecisionSection(bf16=True).label == "bf16"
    assert PrecisionSection(**FP8, fp8_recipe="rowwise").label == "FP8 hybrid rowwise"
    plain = describe_objective(run())
    assert describe_objective(run(precision__bf16=True)) == f"{plain}, bf16"
