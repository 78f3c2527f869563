"""What transformers would not load, or would load in part, is no export."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_tspin.conversion.loading import check_loads
from megatron_tspin.errors import InputError


@pytest.fixture
def folder(tiny_checkpoint: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("untied"), tmp_path / "hf"))


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_whole_checkpoint_loads(kind: str, tiny_checkpoint: Any) -> None:
    check_loads(tiny_checkpoint(kind))


def test_other_tensors_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.extra"] = tensors.pop("lm_head.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"other tensors than the export: lm_head.weight, model.extra"):
        check_loads(folder)


@pytest.mark.parametrize(("name", "value"), [("hidden_size", "wide"), ("model_type", "unheard-of")])
def test_configs_that_transformers_refuses_are_refused(name: str, value: Any, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(InputError, match=r"transformers cannot load the export: \w+: "):
        check_loads(folder)
