"""Distributed checkpoints: every layout loads what every other one saved, and nothing broken is loaded."""

import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.checkpoint.manifest import describe_files, verify_checkpoint, write_manifest
from megatron_tspin.cli.main import main
from megatron_tspin.config import ParallelSection
from megatron_tspin.errors import ArtifactError, InputError, StageError
from megatron_tspin.storage import sha256_file
from tests.checkpoint.store_runs import build, layout, wrap
from tests.rank_pool import in_layout


def save_plain(hf: Path, folder: Path, parallel: ParallelSection, state: dict[str, Any]) -> None:
    """A checkpoint without optimizer."""
    from megatron_tspin.checkpoint.hf_weights import load_hf
    from megatron_tspin.checkpoint.store import save_checkpoint

    with in_layout(parallel) as topology:
        model = build(hf, parallel, topology)
        load_hf(model, topology)
        save_checkpoint(folder, model, topology, state=state)


def load_plain(hf: Path, folder: Path, parallel: ParallelSection, with_optimizer: bool = False) -> dict[str, Any]:
    from megatron_tspin.checkpoint.store import load_checkpoint

    with in_layout(parallel) as topology:
        model = build(hf, parallel, topology)
        optimizer = wrap(model, parallel, bf16=False)[1] if with_optimizer else None
        return load_checkpoint(folder, model, topology, optimizer)


@pytest.fixture(scope="module")
def saved(ranks, tiny_checkpoint, tmp_path_factory) -> Path:
    """Three checkpoints of two ranks; do not write into it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for number in (1, 2, 10):
        ranks(2).run(save_plain, tiny_checkpoint("tied"), folder / f"step_{number:08d}", layout(pp=2), {"step": number})
    return folder


@pytest.fixture
def checkpoints(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def shard(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def test_a_whole_checkpoint_says_what_it_is(saved):
    manifest = verify_checkpoint(saved / "step_00000010")
    assert manifest["state"] == {"step": 10}
    assert manifest["facts"]["layout"] == {"tp": 1, "pp": 2, "dp": 1, "cp": 1}
    assert manifest["facts"]["optimizer"] is None and manifest["facts"]["architecture"]["num_layers"] == 4
    assert set(manifest["files"]) == {path.name for path in (saved / "step_00000010").iterdir()} - {"manifest.json"}
    assert not list(saved.glob("*.partial"))


def remove(path: Path) -> str:
    path.unlink()
    return rf"{path}: missing; manifest.json names it with \d+ bytes"


def truncate(path: Path) -> str:
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path}: {size - 1} bytes, manifest.json says {size}"


def flip_a_bit(path: Path) -> str:
    content = bytearray(path.read_bytes())
    before = hashlib.sha256(content).hexdigest()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return f"{path}: SHA-256 {hashlib.sha256(content).hexdigest()}, manifest.json says {before}"


@pytest.mark.parametrize("damage", [remove, truncate, flip_a_bit])
@pytest.mark.parametrize("name", ["shard", ".metadata", "metadata.json"])
def test_a_broken_checkpoint_is_refused_and_passed_over(ranks, tiny_checkpoint, checkpoints, damage, name):
    broken = checkpoints / "step_00000010"
    message = damage(shard(broken) if name == "shard" else broken / name)
    with pytest.raises(ArtifactError, match=message):
        verify_checkpoint(broken)
    with pytest.raises(ArtifactError, match=message):
        ranks(2).run(load_plain, tiny_checkpoint("tied"), broken, layout(tp=2))
    (found, log), other = ranks(2).run(newest, checkpoints)
    assert found == other[0] == checkpoints / "step_00000002"
    assert f"{broken} is not whole and is passed over: " in log and re.search(message, log) and not other[1]


def newest(checkpoints: Path) -> tuple[Path | None, str]:
    """What the ranks agree on, and what this one logs."""
    import io
    import logging

    from megatron_tspin.checkpoint.policies import newest_whole

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("megatron_tspin").addHandler(handler)
    try:
        with in_layout(layout(tp=2)) as topology:
            return newest_whole(checkpoints, topology), stream.getvalue()
    finally:
        logging.getLogger("megatron_tspin").removeHandler(handler)


def hashed_while(hf: Path, folder: Path, parallel: ParallelSection) -> list[list[str]]:
    """Files that this rank hashes: when it loads a checkpoint, again, and once more after one was written again."""
    from unittest.mock import patch

    from megatron_tspin.checkpoint import manifest

    hashed: list[list[str]] = []

    def digest(path: Path) -> str:
        hashed[-1].append(path.name)
        return sha256_file(path)

    with patch.object(manifest, "sha256_file", digest):
        for _ in range(2):
            hashed.append([])
            load_plain(hf, folder, parallel)
        hashed.append([])
        import torch.distributed as dist

        dist.barrier()
        if dist.get_rank() == 0:
            (folder / "metadata.json").write_bytes((folder / "metadata.json").read_bytes())
        dist.barrier()
        load_plain(hf, folder, parallel)
    return hashed


def test_a_checkpoint_is_hashed_once_by_a_group_of_processes(ranks, tiny_checkpoint, checkpoints):
    folder = checkpoints / "step_00000010"
    shares = ranks(2).run(hashed_while, tiny_checkpoint("tied"), folder, layout(tp=2))
    first, second, third = (sorted(share[n] for share in shares) for n in range(3))
    assert sorted(first[0] + first[1]) == sorted(verify_or_read(folder)["files"])
    assert all(first), "both ranks have a share"
    assert second == [[], []]
    assert third == [[], ["metadata.json"]]


def test_sizes_are_checked_at_every_load(ranks, tiny_checkpoint, checkpoints):
    folder = checkpoints / "step_00000010"
    ranks(2).run(load_plain, tiny_checkpoint("tied"), folder, layout(tp=2))
    message = truncate(shard(folder))
    with pytest.raises(ArtifactError, match=message):
        ranks(2).run(load_plain, tiny_checkpoint("tied"), folder, layout(tp=2))


def test_the_command_names_all_that_is_broken(checkpoints, capsys):
    folder = checkpoints / "step_00000010"
    manifest = verify_checkpoint(folder)
    assert main(["checkpoint", "verify", str(folder)]) == 0
    size = sum((folder / name).stat().st_size for name in manifest["files"])
    assert capsys.readouterr().out == f"{folder}: whole, {len(manifest['files'])} files, {size} bytes\n"
    messages = [remove(folder / "metadata.json"), truncate(folder / ".metadata"), flip_a_bit(shard(folder))]
    assert main(["checkpoint", "verify", str(folder)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for message in messages:
        assert sum(bool(re.fullmatch(f"tspin: error: {message}", line)) for line in lines) == 1


def test_a_manifest_that_is_missing_torn_or_altered(ranks, checkpoints):
    missing, torn, altered = (checkpoints / f"step_{number:08d}" / "manifest.json" for number in (1, 2, 10))
    missing.unlink()
    torn.write_text(torn.read_text()[:-40])
    altered.write_text(altered.read_text().replace('"step": 10', '"step": 11'))
    for path, message in ((missing, "no such file"), (torn, "not valid JSON"), (altered, "it was altered")):
        with pytest.raises(ArtifactError, match=message):
            verify_checkpoint(path.parent)
    for folder in (checkpoints, checkpoints / "nowhere"):
        assert ranks(2).run(newest, folder)[0][0] is None


def sign_again(folder: Path, files: dict[str, Any] | None = None) -> None:
    """What an attacker would do: a manifest that fits."""
    manifest = verify_or_read(folder)
    names = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
    write_manifest(folder, files or describe_files(folder, names), manifest["facts"], manifest["state"])


def verify_or_read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


class Touch:
    """A pickle that creates a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_pickle_with_a_fitting_manifest_runs_nothing(ranks, tiny_checkpoint, checkpoints, tmp_path, name):
    folder = checkpoints / "step_00000010"
    (folder / name).write_bytes(pickle.dumps(Touch(tmp_path / "was_run"), protocol=2))
    sign_again(folder)
    with pytest.raises(ArtifactError, match=r"(names posix.mkdir, which does not belong|Weights only load failed)"):
        ranks(1).run(load_plain, tiny_checkpoint("tied"), folder, layout())
    assert not (tmp_path / "was_run").exists()


def open_as_object(content: bytes) -> str:
    """What torch's planner does with a tensor that the metadata declares to be an object."""
    import io

    import torch

    from megatron_tspin.checkpoint.safe_pickle import restricted_metadata

    before = dict(os.environ)
    with restricted_metadata(), pytest.raises(pickle.UnpicklingError) as caught:
        torch.load(io.BytesIO(content), weights_only=False)
    assert dict(os.environ) == before
    return str(caught.value)


def test_an_object_among_the_tensors_runs_nothing(ranks, tmp_path):
    content = pickle.dumps(Touch(tmp_path / "was_run"), protocol=2)
    (message,) = ranks(1).run(open_as_object, content)
    assert "posix.mkdir" in message and not (tmp_path / "was_run").exists()


def test_a_checkpoint_of_a_newer_megatron_core_is_refused(ranks, tiny_checkpoint, checkpoints):
    folder = checkpoints / "step_00000010"
    if not (folder / "common.pt").exists():
        pytest.skip("this megatron-core reads checkpoints without common.pt")
    (folder / "common.pt").unlink()
    sign_again(folder)
    with pytest.raises(InputError, match=r"step_00000010: saved by megatron-core [\d.]+, which [\d.]+ cannot read; "):
        ranks(1).run(load_plain, tiny_checkpoint("tied"), folder, layout())


def test_a_manifest_names_only_files_beside_it(checkpoints, tmp_path):
    folder = checkpoints / "step_00000010"
    (tmp_path / "outside").write_text("x")
    files = verify_or_read(folder)["files"] | {"../../outside": {"size": 1, "sha256": "0"}}
    sign_again(folder, files)
    with pytest.raises(ArtifactError, match=r"names '../../outside', which is not a file beside it"):
        verify_checkpoint(folder)


def test_another_architecture_and_a_missing_optimizer_are_refused(ranks, tiny_checkpoint, saved):
    folder = saved / "step_00000001"
    with pytest.raises(InputError, match="tied_embeddings is True there and False in the model"):
        ranks(2).run(load_plain, tiny_checkpoint("untied"), folder, layout(tp=2))
    with pytest.raises(InputError, match="step_00000001: holds no optimizer state; continue from one saved inside"):
        ranks(1).run(load_plain, tiny_checkpoint("tied"), folder, layout(), True)


def test_saving_replaces_and_leaves_no_rests(ranks, tiny_checkpoint, checkpoints):
    folder = checkpoints / "step_00000010"
    partial = checkpoints / "step_00000010.partial"
    partial.mkdir()
    (partial / "rest").write_text("of a killed writer")
    ranks(2).run(save_plain, tiny_checkpoint("tied"), folder, layout(tp=2), {"step": 10, "again": True})
    assert verify_checkpoint(folder)["state"]["again"] and not partial.exists() and not (folder / "rest").exists()


def fail_to_write(hf: Path, folder: Path, parallel: ParallelSection) -> None:
    """A disk that is full for rank 1."""
    import errno

    from megatron_tspin.checkpoint import in_process_save

    class FullDisk(in_process_save._NamelessWriter):
        def write_data(self, *args: Any) -> Any:
            if os.environ["RANK"] == "1":
                raise OSError(errno.ENOSPC, "No space left on device", str(folder))
            return super().write_data(*args)

    original = in_process_save._NamelessWriter
    in_process_save._NamelessWriter = FullDisk
    try:
        save_plain(hf, folder, parallel, {})
    finally:
        in_process_save._NamelessWriter = original


def test_a_full_disk_leaves_the_earlier_checkpoint(ranks, tiny_checkpoint, checkpoints):
    with pytest.raises(
        StageError, match=r"step_00000010: cannot be written: No space left on device; it needs \d+ bytes"
    ):
        ranks(2).run(fail_to_write, tiny_checkpoint("tied"), checkpoints / "step_00000010", layout(tp=2))
    assert verify_checkpoint(checkpoints / "step_00000010")["state"] == {"step": 10}


def test_a_checkpoint_that_is_made_again_has_the_same_bytes(ranks, tiny_checkpoint, tmp_path):
    from tests.training.rescored import save_policy

    for name in ("here", "elsewhere/again"):
        ranks(1).run(save_policy, tiny_checkpoint("tied"), tmp_path / name)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("here", "elsewhere/again")
    )
    assert first == second and str(tmp_path).encode() not in first[".metadata"]
