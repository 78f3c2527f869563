"""Which files of an HF folder hold its weights. No torch here: the driver asks too."""

import shlex
from pathlib import Path

from megatron_tspin.errors import ArtifactError, InputError
from megatron_tspin.storage import read_json, sha256_file, sha256_text

WEIGHTS = "model.safetensors"
_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint, sorted by name.

    `model.safetensors` goes before the files of `model.safetensors.index.json`, as in transformers; without either, all
    `*.safetensors` count.

    Raises:
        InputError: No safetensors files, or an index that names a file outside the folder.
        ArtifactError: A file that the index names is missing, or the index names none.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    found = sorted(path for path in folder.glob("*.safetensors") if path.name != _ADAPTER_WEIGHTS)
    if found:
        return found
    if (folder / _ADAPTER).is_file():
        raise InputError(
            f"{folder}: this is a LoRA adapter ({_ADAPTER}), not a model; merge it into its base first (peft: "
            "`model.merge_and_unload().save_pretrained(folder)`) and give that folder"
        )
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"{folder}: {pickled[0]} is a pickle, which can run code when opened, and is not read; if you trust it, "
            f"save it as safetensors and give that folder:\n{_conversion(folder)}"
        )
    raise InputError(f"{folder}: no *.safetensors file")


def _conversion(folder: Path) -> str:
    """The command that loads a pickled checkpoint and writes safetensors beside its folder, for people to paste."""
    source = str(folder.resolve())
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; s, t = sys.argv[1:]; "
        "M.from_pretrained(s, dtype='auto').save_pretrained(t); T.from_pretrained(s).save_pretrained(t)"
    )
    return f"python -c {shlex.quote(code)} {shlex.quote(source)} {shlex.quote(source + '-safetensors')}"


def source_digest(folder: Path) -> str:
    """Hex SHA-256 over config.json and the weights of an HF folder."""
    files = [folder / "config.json", *weight_files(folder)]
    return sha256_text("".join(f"{path.name} {sha256_file(path)}\n" for path in files))


def _indexed_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    tree = read_json(index)
    names = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(names, dict) or not names:
        raise ArtifactError(f"{index}: no `weight_map`")
    files = sorted({str(name) for name in names.values()})
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{index}: weight_map names {name!r}; only *.safetensors files beside the index are read")
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name}: no such file, but {INDEX} names it; download the checkpoint again")
    return [folder / name for name in files]
