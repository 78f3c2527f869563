"""HF -> core -> HF gives the same bits under every layout, and core computes what transformers computes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.config import ParallelSection, TrainingSection
from megatron_tspin.config_precision import PrecisionSection
from megatron_tspin.errors import InputError, ParityError
from tests.rank_pool import in_layout

KINDS = ["tied", "untied", "llama3_rope", "mistral_window"]
LAYOUTS = {
    "TP1": (1, 1, 1),
    "TP2": (2, 1, 1),
    "PP2": (1, 2, 1),
    "DP2": (1, 1, 2),
    "TP2xPP2": (2, 2, 1),
    "PP4": (1, 4, 1),
}


def layout(name: str) -> ParallelSection:
    tp, pp, dp = LAYOUTS[name]
    return ParallelSection(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, data_parallel_size=dp, sequence_parallel=tp > 1
    )


def loaded(hf: Path, parallel: ParallelSection, topology: Any, bf16: bool = False) -> Any:
    """A policy with NaN wherever `load_hf` wrote nothing."""
    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.models.build import build_policy
    from megatron_tspin.models.hf_config import read_architecture

    model = build_policy(read_architecture(hf), parallel, TrainingSection(), PrecisionSection(bf16=bf16), topology)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    load_hf(model, topology)
    return model


def round_trip(hf: Path, parallel: ParallelSection, target: Path, options: dict[str, Any]) -> float:
    """Exports what was loaded, and measures parity. The same process serves several kinds, one after the other."""
    from megatron_tspin.checkpoint.hf_weights import export_hf
    from megatron_tspin.conversion.parity import check_parity, read_sentences

    with in_layout(parallel) as topology:
        model = loaded(hf, parallel, topology)
        export_hf(model, topology, hf, target, **options)
        return check_parity(model, topology, hf, read_sentences(hf, None)).worst.difference


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_bits(expected: dict[str, Any], actual: dict[str, Any]) -> None:
    import torch

    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == actual[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), actual[name].view(torch.uint8)), name


@pytest.mark.parametrize(
    ("kind", "name"), [*((kind, name) for kind in KINDS for name in LAYOUTS if name != "PP4"), ("tied", "PP4")]
)
def test_round_trip_and_parity(ranks, tiny_checkpoint, tmp_path, kind, name):
    source, parallel = tiny_checkpoint(kind), layout(name)
    differences = ranks(parallel.world_size).run(round_trip, source, parallel, tmp_path / "out", {})
    assert len(set(differences)) == 1
    assert_same_bits(tensors(source), tensors(tmp_path / "out"))
    for path in source.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def bf16_copy(source: Path, target: Path) -> Path:
    """The checkpoint in bf16, sharded, with an index."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
    model.save_pretrained(target, max_shard_size="20KB")
    for path in source.glob("tokenizer*"):
        shutil.copy(path, target)
    assert (target / "model.safetensors.index.json").is_file()
    return target


def test_bf16_shards_keep_their_bits_and_another_shard_size_too(ranks, tiny_checkpoint, tmp_path):
    source = bf16_copy(tiny_checkpoint("untied"), tmp_path / "bf16")
    ranks(2).run(round_trip, source, layout("TP2"), tmp_path / "out", {"shard_bytes": 9000})
    assert_same_bits(tensors(source), tensors(tmp_path / "out"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.stat().st_size < 9000 + 2000  # and the header
        assert {name for name, file in index["weight_map"].items() if file == path.name} == load_names(path)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(source).values())


def load_names(path: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        return set(opened.keys())


def test_exported_dtype_can_be_chosen(ranks, tiny_checkpoint, tmp_path):
    import torch

    source = tiny_checkpoint("tied")
    ranks(1).run(round_trip, source, layout("TP1"), tmp_path / "out", {"dtype": torch.bfloat16})
    assert_same_bits({name: tensor.bfloat16() for name, tensor in tensors(source).items()}, tensors(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**json.loads((source / "config.json").read_text()), "dtype": "bfloat16"}


def padding_of(hf: Path, parallel: ParallelSection) -> dict[str, Any]:
    """The vocabulary rows of this rank that pad it, and how many rows there are in all."""
    with in_layout(parallel) as topology:
        model = loaded(hf, parallel, topology)
        first = 128 // topology.tp_size * topology.tp_rank
        return {
            name: (len(parameter), parameter[max(0, 101 - first) :].detach().numpy())
            for name, parameter in model.named_parameters()
            if "embedding" in name or "output_layer" in name
        }


@pytest.mark.parametrize("name", ["TP1", "TP2", "PP2"])
def test_padded_rows_are_zero(ranks, tiny_checkpoint, name):
    results = ranks(layout(name).world_size).run(padding_of, tiny_checkpoint("untied"), layout(name))
    found = [part for result in results for part in result.values()]
    assert sum(rows for rows, _ in found) == 2 * 128
    assert sum(len(padding) for _, padding in found) == 2 * 27
    assert all((padding == 0).all() for _, padding in found)


def wrong_rope(hf: Path, parallel: ParallelSection, other: Path) -> None:
    """The bug of the converters that ignore rope scaling: weights right, frequencies of another config."""
    from megatron_tspin.conversion.parity import check_parity, read_sentences
    from megatron_tspin.models.hf_config import read_architecture
    from megatron_tspin.models.rotary import RotaryFrequencies

    with in_layout(parallel) as topology:
        model = loaded(hf, parallel, topology)
        model.rotary = RotaryFrequencies(read_architecture(other))
        check_parity(model, topology, hf, read_sentences(hf, None))


def test_the_parity_gate_sees_a_wrong_rope(ranks, tiny_checkpoint):
    source = tiny_checkpoint("llama3_rope")
    words = r"of 7 sequence .* \(bound 5e-06\).*; layer 0 is the first that departs, by .*nothing was written"
    with pytest.raises(ParityError, match=words):
        ranks(2).run(wrong_rope, source, layout("PP2"), tiny_checkpoint("untied"))


def off_by_one_window(hf: Path, parallel: ParallelSection, keys: int) -> None:
    from megatron_tspin.conversion.parity import check_parity, read_sentences
    from megatron_tspin.models.attention import CausalAttention

    with in_layout(parallel) as topology:
        model = loaded(hf, parallel, topology)
        for module in model.modules():
            if isinstance(module, CausalAttention):
                module.scores = replace(module.scores, window=keys)
        check_parity(model, topology, hf, read_sentences(hf, None))


def test_the_parity_gate_sees_a_window_that_is_off_by_one(ranks, tiny_checkpoint):
    source = tiny_checkpoint("mistral_window")
    ranks(1).run(off_by_one_window, source, layout("TP1"), 8)
    for keys in (7, 9):
        with pytest.raises(ParityError):
            ranks(1).run(off_by_one_window, source, layout("TP1"), keys)


def refused(hf: Path, parallel: ParallelSection) -> None:
    with in_layout(parallel) as topology:
        loaded(hf, parallel, topology)


def rewrite(source: Path, target: Path, change: Any, **config: Any) -> Path:
    """A copy of the checkpoint whose dict of tensors went through `change`."""
    from safetensors.torch import save_file

    shutil.copytree(source, target)
    weights = tensors(source)
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, target / "model.safetensors")
    settings = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**settings, **config}))
    return target


def test_every_tensor_that_does_not_fit_is_named_in_one_report(ranks, tiny_checkpoint, tmp_path):
    import torch

    def change(weights: dict[str, Any]) -> None:
        del weights["model.layers.2.mlp.up_proj.weight"]
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
        weights["model.norm.weight"] = torch.zeros(31)
        weights["model.layers.1.mlp.down_proj.weight"] = torch.zeros(32, 64, dtype=torch.int8)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    hf = rewrite(tiny_checkpoint("untied"), tmp_path / "hf", change)
    with pytest.raises(InputError) as caught:
        ranks(1).run(refused, hf, layout("TP1"))
    assert str(caught.value).splitlines() == [
        f"{hf}: tensor model.layers.1.mlp.down_proj.weight has dtype I8; use an unquantised checkpoint in F64, F32, "
        "F16, BF16",
        f"{hf}: tensor model.layers.2.mlp.up_proj.weight is missing; config.json describes an architecture that has it",
        f"{hf}: tensor model.norm.weight has shape [31], config.json demands [32]",
        f"{hf}: tensor model.layers.0.self_attn.q_proj.bias is left over; no part of the architecture in config.json "
        "takes it",
    ]


def test_a_stored_copy_of_a_tied_embedding_must_be_equal(ranks, tiny_checkpoint, tmp_path):
    def copy(weights: dict[str, Any]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    def other(weights: dict[str, Any]) -> None:
        copy(weights)
        weights["lm_head.weight"][100, 31] += 1

    equal = rewrite(tiny_checkpoint("tied"), tmp_path / "equal", copy)
    ranks(2).run(round_trip, equal, layout("PP2"), tmp_path / "out", {})
    assert_same_bits(tensors(tiny_checkpoint("tied")), tensors(tmp_path / "out"))
    different = rewrite(tiny_checkpoint("tied"), tmp_path / "different", other)
    with pytest.raises(InputError, match=r"lm_head.weight differs from model.embed_tokens.weight; set tie_word_emb"):
        ranks(1).run(refused, different, layout("TP1"))
