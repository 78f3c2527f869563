"""Whether an HF folder is whole: its files, its index, the tensors of its config.json, and every value."""

from collections.abc import Iterator
from pathlib import Path

from megatron_tspin.checkpoint.hf_folder import HFFolder
from megatron_tspin.checkpoint.tensor_check import weight_names
from megatron_tspin.checkpoint.weight_files import INDEX, WEIGHTS, weight_files
from megatron_tspin.errors import ArtifactError, InputError
from megatron_tspin.log import track
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.storage import read_json


def verify_hf(folder: Path) -> tuple[int, int]:
    """Reads every value of an HF folder, one tensor at a time.

    Returns:
        Number of files with weights, and their bytes.

    Raises:
        InputError: config.json is refused; or names every tensor that is missing, left over, of another shape or type,
            in another file than the index says, or with values that are NaN or infinite.
    """
    found = HFFolder(folder)
    problems = list(_index_problems(found))
    architecture = read_architecture(folder)
    try:
        found.check(architecture)
    except InputError as error:
        problems += str(error).splitlines()
    names = weight_names(found.headers, architecture)
    for name in track(names, "verify", len(names), "tensor"):
        try:
            found.read(name)
        except InputError as error:
            problems += str(error).splitlines()
    if problems:
        raise ArtifactError("\n".join(dict.fromkeys(problems)))
    paths = weight_files(folder)
    return len(paths), sum(path.stat().st_size for path in paths)


def _index_problems(found: HFFolder) -> Iterator[str]:
    """Differences between the index and the files, if there is one and transformers reads it."""
    index = found.folder / INDEX
    if (found.folder / WEIGHTS).is_file() or not index.is_file():
        return
    listed: dict[str, str] = read_json(index)["weight_map"]
    for name, file in listed.items():
        if name not in found.names:
            yield f"{index}: tensor {name} is in none of its files, least of all in {file}"
        elif found.file(name).name != file:
            yield f"{index}: tensor {name} is in {found.file(name).name}, not in {file}"
    for name in sorted(found.names - set(listed)):
        yield f"{index}: tensor {name} of {found.file(name).name} is not listed, so transformers leaves it out"
