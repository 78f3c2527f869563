"""HF folders that cannot be used are refused by name, before any tensor is read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_tspin.checkpoint.hf_folder import HFFolder, weight_files
from megatron_tspin.errors import ArtifactError, InputError


@pytest.fixture
def folder(tiny_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("untied"), tmp_path / "hf"))


def index(folder: Path, file: str) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))


@pytest.mark.parametrize("name", ["../hf/weights.safetensors", "/etc/weights.safetensors", "sub/weights.safetensors"])
def test_an_index_names_only_files_beside_it(folder, name):
    index(folder, name)
    with pytest.raises(InputError, match=r"weight_map names '.*'; only \*.safetensors files beside the index are read"):
        HFFolder(folder)


def test_an_index_names_only_files_that_are_there(folder):
    index(folder, "gone.safetensors")
    with pytest.raises(ArtifactError, match=r"gone.safetensors: no such file, but model.safetensors.index.json names"):
        HFFolder(folder)


def test_files_that_the_index_does_not_name_are_left_alone(folder):
    index(folder, "weights.safetensors")
    (folder / "consolidated.safetensors").write_bytes(b"other")
    assert weight_files(folder) == [folder / "weights.safetensors"]
    assert "lm_head.weight" in HFFolder(folder).names


def test_a_pickle_is_not_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(InputError, match=r"pytorch_model.bin is a pickle, .* save it as safetensors"):
        HFFolder(folder)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no \*.safetensors file"):
        HFFolder(folder)


def test_a_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"model.safetensors: not a whole safetensors file .*; download it again"):
        HFFolder(folder)


def test_a_tensor_in_two_files(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(ArtifactError, match=r"b.safetensors: tensor .* is in a.safetensors as well"):
        HFFolder(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_named(value: float, tiny_checkpoint: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint("tied"), tmp_path / "hf"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        HFFolder(folder).read(name, slice(2, 4))
    assert str(caught.value).startswith(f"{folder / 'model.safetensors'}: tensor {name} holds 1 values that are NaN")
    HFFolder(folder).read(name, slice(4, 8))


def test_the_refusal_of_a_pickle_names_a_command_that_converts_it(folder: Path, tmp_path: Path) -> None:
    """Run as people would paste it, but for the shell and the process."""
    import shlex
    import sys
    from unittest.mock import patch

    import torch

    expected = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(expected, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin is a pickle") as caught:
        HFFolder(folder)
    python, flag, code, *arguments = shlex.split(str(caught.value).splitlines()[1])
    assert (python, flag) == ("python", "-c")
    with patch.object(sys, "argv", ["-c", *arguments]):
        exec(code, {})
    converted = HFFolder(Path(arguments[1]))
    assert converted.names == set(expected)
    assert all(torch.equal(converted.read(name), expected[name]) for name in expected)
    assert (Path(arguments[1]) / "tokenizer.json").is_file()


@pytest.mark.parametrize("seed", [0, 1])
def test_tensors_may_lie_in_any_file_in_any_order(seed: int, tiny_checkpoint: Any, tmp_path: Path) -> None:
    import random

    import torch

    from megatron_tspin.models.hf_config import read_architecture

    source = tiny_checkpoint("untied")
    tensors = load_file(source / "model.safetensors")
    names = list(tensors)
    random.Random(seed).shuffle(names)
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    listed = {name: f"model-{index % 3 + 1:05d}-of-00003.safetensors" for index, name in enumerate(names)}
    for file in set(listed.values()):
        save_file({name: tensors[name] for name in names if listed[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    found = HFFolder(folder)
    found.check(read_architecture(folder))
    assert all(torch.equal(found.read(name), tensors[name]) for name in names)
    assert {name: found.file(name).name for name in names} == listed
