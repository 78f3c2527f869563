"""`tspin checkpoint` on HF folders and on distributed checkpoints, in one process; ranks only make what it reads."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tspin.checkpoint.core_folder import CoreFolder
from megatron_tspin.checkpoint.hf_folder import HFFolder
from megatron_tspin.checkpoint.manifest import verify_checkpoint, write_manifest
from megatron_tspin.cli.main import main
from megatron_tspin.config import ParallelSection
from megatron_tspin.errors import ArtifactError
from tests.checkpoint.store_runs import build, layout
from tests.rank_pool import in_layout

LAYOUTS = {"TP1": layout(), "TP2": layout(tp=2), "PP2": layout(pp=2)}
UP = "model.layers.1.mlp.up_proj.weight"


def save_in(hf: Path, folder: Path, parallel: ParallelSection, state: dict[str, Any]) -> None:
    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.checkpoint.store import save_checkpoint

    with in_layout(parallel) as topology:
        model = build(hf, parallel, topology)
        load_hf(model, topology)
        save_checkpoint(folder, model, topology, state=state)


@pytest.fixture(scope="module")
def saved(ranks: Any, tiny_checkpoint: Any, tmp_path_factory: Any) -> Callable[[str, str], Path]:
    """`saved(kind, layout)` is a checkpoint that ranks wrote. Do not write into it."""
    root = tmp_path_factory.mktemp("saved")

    def get(kind: str, name: str) -> Path:
        folder: Path = root / kind / name
        if not folder.is_dir():
            folder.parent.mkdir(exist_ok=True)
            source = tiny_checkpoint(kind)
            state = {"hf_checkpoint": str(source), "step": 7, "iteration": 2}
            ranks(LAYOUTS[name].world_size).run(save_in, source, folder, LAYOUTS[name], state)
        return folder

    return get


def copied(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Path:
    """An HF folder whose tensors went through `change`."""
    shutil.copytree(source, target)
    if change is not None:
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def said(capsys: Any, *arguments: Any) -> Any:
    """The JSON that a command prints."""
    main(["checkpoint", *map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["tied", "llama_biases", "gpt_neox"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_resharding_writes_what_the_ranks_write(saved: Any, tmp_path: Path, kind: str, name: str) -> None:
    there = saved(kind, "TP2" if name == "TP1" else "TP1")
    size = [LAYOUTS[name].tensor_model_parallel_size, LAYOUTS[name].pipeline_model_parallel_size]
    flags = [f"--tensor-model-parallel-size={size[0]}", f"--pipeline-model-parallel-size={size[1]}"]
    assert main(["checkpoint", "reshard", str(there), "--save", str(tmp_path / "out"), *flags]) == 0
    expected = saved(kind, name)
    assert {path.name for path in expected.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}
    for path in expected.glob("*.distcp"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    ours, theirs = (pickle.loads((folder / ".metadata").read_bytes()) for folder in (tmp_path / "out", expected))
    assert ours.storage_data == theirs.storage_data and ours.state_dict_metadata == theirs.state_dict_metadata
    manifest = verify_checkpoint(tmp_path / "out")
    assert manifest["facts"] == verify_checkpoint(expected)["facts"] and manifest["state"]["step"] == 7


def load_in(hf: Path, folder: Path, parallel: ParallelSection) -> None:
    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.checkpoint.store import load_checkpoint

    with in_layout(parallel) as topology:
        model, other = build(hf, parallel, topology), build(hf, parallel, topology)
        load_hf(model, topology)
        load_checkpoint(folder, other, topology)
        for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two), name


def test_what_is_resharded_loads(ranks: Any, tiny_checkpoint: Any, saved: Any, tmp_path: Path) -> None:
    main(
        [
            "checkpoint",
            "reshard",
            str(saved("tied", "TP1")),
            "--save",
            str(tmp_path),
            "--pipeline-model-parallel-size=2",
        ]
    )
    for parallel in (layout(tp=2), layout(pp=2)):
        ranks(2).run(load_in, tiny_checkpoint("tied"), tmp_path, parallel)


def test_info(tiny_checkpoint: Any, saved: Any, capsys: Any) -> None:
    hf, core = tiny_checkpoint("tied"), saved("tied", "TP2")
    one, two = said(capsys, "info", hf, "--digests"), said(capsys, "info", core)
    same = ("family", "parameters", "parameters_per_layer")
    assert {name: one[name] for name in same} == {name: two[name] for name in same}
    assert one["parameters"] == sum(tensor.numel() for tensor in load_file(hf / "model.safetensors").values())
    assert len(one["parameters_per_layer"]) == 4 and one["dtypes"] == {"F32": 38} and len(one["digest"]) == 64
    assert two["layout"] == {"tp": 2, "pp": 1, "dp": 1, "cp": 1} and (two["step"], two["iteration"]) == (7, 2)
    assert two["source"] == str(hf) and two["optimizer"] is False
    assert main(["checkpoint", "info", str(core)]) == 0
    text = capsys.readouterr().out
    assert "4 layers of 9,280" in text and "TP 2 x PP 1 x DP 1 x CP 1" in text and "7 of iteration 2" in text


def test_verify_names_everything_that_is_wrong_with_a_folder(tiny_checkpoint: Any, tmp_path: Path, capsys: Any) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][0, 0] = float("inf")
        tensors["model.norm.weight"] = torch.ones(31)
        tensors["stray"] = torch.ones(1)

    whole = copied(tiny_checkpoint("untied"), tmp_path / "whole")
    assert said(capsys, "verify", whole)["whole"] is True
    broken = copied(whole, tmp_path / "broken", change)
    file = "model-00001-of-00001.safetensors"
    (broken / "model.safetensors").rename(broken / file)
    listed = dict.fromkeys([*load_file(broken / file), "gone"], file)
    del listed["stray"]
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    answer = said(capsys, "verify", broken)
    assert answer["whole"] is False and len(answer["problems"]) == 5
    for part in (
        "gone is in none of its files",
        f"stray of {file} is not listed",
        "model.norm.weight has shape [31]",
        "stray is left over",
        f"{UP} holds 1 values that are NaN",
    ):
        assert any(part in line for line in answer["problems"]), part
    assert main(["checkpoint", "verify", str(broken)]) == 2


def test_verify_of_a_distributed_checkpoint_as_json(saved: Any, tmp_path: Path, capsys: Any) -> None:
    folder = Path(shutil.copytree(saved("tied", "TP1"), tmp_path / "core"))
    assert said(capsys, "verify", folder)["whole"] is True
    (folder / "metadata.json").unlink()
    assert said(capsys, "verify", folder)["problems"] == [
        f"{folder / 'metadata.json'}: missing; manifest.json names it with 119 bytes"
    ]


def test_diff(tiny_checkpoint: Any, saved: Any, tmp_path: Path, capsys: Any) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][3, 4] += 0.5
        tensors["model.norm.weight"] = torch.ones(31)
        del tensors["lm_head.weight"]
        tensors["more"] = torch.ones(1)

    hf = tiny_checkpoint("untied")
    for first, second in ((hf, hf), (hf, saved("untied", "TP2")), (saved("untied", "TP1"), saved("untied", "PP2"))):
        assert main(["checkpoint", "diff", str(first), str(second)]) == 0
        assert capsys.readouterr().out.startswith("the same: ")
    other = copied(hf, tmp_path / "other", change)
    answer = said(capsys, "diff", hf, other)
    found = {each["name"]: each for each in answer["differing"]}
    assert set(found) == {UP, "model.norm.weight", "lm_head.weight", "more"} and answer["same"] is False
    norm = float(load_file(hf / "model.safetensors")[UP].double().norm())
    assert found[UP]["max_abs"] == pytest.approx(0.5) and found[UP]["relative"] == pytest.approx(0.5 / norm, rel=1e-6)
    assert found["lm_head.weight"]["second"] is None and found["more"]["first"] is None
    assert found["model.norm.weight"]["max_abs"] is None
    assert main(["checkpoint", "diff", str(saved("untied", "TP1")), str(other)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"4 of 40 tensors differ; 1 only in the first; 1 only in the second; largest absolute difference 0.5 in {UP}"
    )
    assert main(["checkpoint", "diff", str(hf), str(tmp_path / "nowhere")]) == 2


def test_diff_of_other_architectures_names_what_differs(tiny_checkpoint: Any, saved: Any, capsys: Any) -> None:
    assert main(["checkpoint", "diff", str(saved("tied", "TP1")), str(tiny_checkpoint("untied"))]) == 2
    assert "tied_embeddings is True there and False here" in capsys.readouterr().err


def scaled(factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = (tensor * factor).bfloat16()

    return change


def test_the_mean_of_hf_folders(tiny_checkpoint: Any, tmp_path: Path) -> None:
    source = tiny_checkpoint("untied")
    folders = [copied(source, tmp_path / str(factor), scaled(factor)) for factor in (1.0, 1.01, 5.0)]
    arguments = [*map(str, folders), "--save", str(tmp_path / "mean"), "--shard-size", "20KB"]
    assert main(["checkpoint", "average", *arguments]) == 0
    mean = HFFolder(tmp_path / "mean")
    for name in mean.names:
        expected = torch.stack([HFFolder(folder).read(name).float() for folder in folders]).mean(0).bfloat16()
        assert torch.equal(mean.read(name), expected), name
    assert (tmp_path / "mean" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert len(list((tmp_path / "mean").glob("*.safetensors"))) > 1


def test_the_mean_of_distributed_checkpoints(ranks: Any, saved: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    one, two = saved("untied", "TP2"), tmp_path / "two"
    double = copied(tiny_checkpoint("untied"), tmp_path / "hf", lambda tensors: tensors.update(doubled(tensors)))
    ranks(2).run(save_in, double, two, layout(pp=2), {})
    assert main(["checkpoint", "average", str(one), str(two), "--save", str(tmp_path / "mean")]) == 0
    manifest = verify_checkpoint(tmp_path / "mean")
    assert manifest["facts"]["layout"]["tp"] == 2 and manifest["state"] == {"averaged": [str(one), str(two)]}
    mean, first = CoreFolder(tmp_path / "mean"), CoreFolder(one)
    for name in first.headers:
        assert torch.equal(mean.read(name), first.read(name) * 1.5), name


def doubled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * 2 for name, tensor in tensors.items()}


def test_a_mean_of_what_does_not_belong_together(tiny_checkpoint: Any, saved: Any, tmp_path: Path, capsys: Any) -> None:
    cases = [
        ((tiny_checkpoint("untied"), tiny_checkpoint("tied")), "tensor lm_head.weight is only in the first"),
        ((tiny_checkpoint("untied"), tiny_checkpoint("llama3_rope")), "ropes is ("),
        (
            (saved("untied", "TP1"), saved("tied", "TP1")),
            "tied_embeddings is False in the first and True in the second",
        ),
        ((saved("untied", "TP1"), tiny_checkpoint("untied")), "one is an HF folder and one is not"),
        ((tiny_checkpoint("untied"),), "a mean needs at least two checkpoints"),
    ]
    for folders, message in cases:
        assert main(["checkpoint", "average", *map(str, folders), "--save", str(tmp_path / "mean")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "mean").exists()


def test_an_hf_folder_in_other_files_and_another_type(tiny_checkpoint: Any, tmp_path: Path, capsys: Any) -> None:
    source, target = tiny_checkpoint("untied"), tmp_path / "out"
    arguments = [
        "checkpoint",
        "reshard",
        str(source),
        "--save",
        str(target),
        "--dtype",
        "bfloat16",
        "--shard-size",
        "20KB",
    ]
    assert main(arguments) == 0
    assert all(path.stat().st_size < 24000 for path in target.glob("*.safetensors"))
    assert said(capsys, "verify", target)["whole"] is True
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    before, after = HFFolder(source), HFFolder(target)
    assert all(torch.equal(before.read(name).bfloat16(), after.read(name)) for name in before.names)
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_flags_of_the_other_kind_are_refused(tiny_checkpoint: Any, saved: Any, tmp_path: Path, capsys: Any) -> None:
    for folder, flag, message in (
        (tiny_checkpoint("tied"), "--tensor-model-parallel-size=2", "only for distributed checkpoints"),
        (saved("tied", "TP1"), "--dtype=float16", "only for HF folders"),
        (saved("tied", "TP1"), "--tensor-model-parallel-size=3", "does not divide the 4 attention heads"),
        (tmp_path, "--dtype=float16", "holds neither manifest.json nor config.json"),
    ):
        assert main(["checkpoint", "reshard", str(folder), "--save", str(tmp_path / "out"), flag]) == 2
        assert message in capsys.readouterr().err


def test_a_checkpoint_whose_facts_lie_elsewhere_is_not_written_anew(saved: Any, tmp_path: Path, capsys: Any) -> None:
    folder = Path(shutil.copytree(saved("tied", "TP1"), tmp_path / "core"))
    (folder / "common.pt").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["common.pt"]
    write_manifest(folder, manifest["files"], manifest["facts"], manifest["state"])
    assert main(["checkpoint", "reshard", str(folder), "--save", str(tmp_path / "out")]) == 2
    assert "has no common.pt: saved by megatron-core" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["checkpoint", "diff", str(folder), str(saved("tied", "TP2"))]) == 0


def test_a_part_that_is_not_what_the_metadata_says(saved: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved("tied", "TP1"), tmp_path / "core"))
    found = CoreFolder(folder)
    first, second = found.parts[:2]
    with pytest.raises(ArtifactError, match="is not "):
        found.read_part(type(first)(first.name, first.offset, first.shape, second.file, second.begin, second.length))


def test_sizes_that_people_write() -> None:
    import argparse

    from megatron_tspin.cli.arguments import byte_count

    sizes = {"5GB": 5 * 10**9, "512MiB": 512 * 2**20, "800000": 800000, "1.5k": 1500, "2 TB": 2 * 10**12, "1b": 1}
    assert {text: byte_count(text) for text in sizes} == sizes
    for text in ("", "GB", "0", "-1", "5iB", "5XB"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no size; write 5GB, 512MiB or a number of bytes"):
            byte_count(text)


def test_experts_of_a_distributed_checkpoint(saved: Any, tiny_checkpoint: Any, capsys: Any) -> None:
    core, hf = saved("qwen3_moe", "TP1"), tiny_checkpoint("qwen3_moe")
    assert main(["checkpoint", "verify", str(core)]) == 0
    assert main(["checkpoint", "diff", str(core), str(core)]) == 0
    assert main(["checkpoint", "diff", str(core), str(hf)]) == 2
    assert "of a mixture of experts" in capsys.readouterr().err
