"""`manifest.json`: what makes a checkpoint whole. No torch here, so the driver can look at checkpoints too."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_tspin.errors import ArtifactError, InputError
from megatron_tspin.log import get_logger
from megatron_tspin.storage import fsync_path, read_json, sha256_file, sha256_text

NAME = "manifest.json"
FORMAT = 1
_FIELDS = {"format", "facts", "state", "files", "sha256"}
_log = get_logger(__name__)


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and hex SHA-256 by name; the files are flushed to the disk."""
    described = {}
    for name in names:
        fsync_path(folder / name)
        described[name] = {"size": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    return described


def write_manifest(folder: Path, files: dict[str, Any], facts: dict[str, Any], state: dict[str, Any]) -> None:
    """Writes the manifest into a folder whose files are all there; the last file of a checkpoint."""
    manifest = {"format": FORMAT, "facts": facts, "state": state, "files": files}
    (folder / NAME).write_text(json.dumps({**manifest, "sha256": _digest(manifest)}, indent=2) + "\n", encoding="utf-8")
    fsync_path(folder / NAME)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest and checks it, but not yet the files that it names.

    Raises:
        ArtifactError: It is missing, torn, altered or of another format version.
    """
    path = folder / NAME
    if not path.is_file():
        what = "no such file" if folder.is_dir() else "no such checkpoint folder"
        raise ArtifactError(f"{path}: {what}; the checkpoint is not whole, use an earlier one")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or set(manifest) != _FIELDS:
        raise ArtifactError(f"{path}: not a manifest of this project; use an earlier checkpoint")
    if manifest["format"] != FORMAT:
        raise ArtifactError(f"{path}: format {manifest['format']!r}, this version reads format {FORMAT}")
    actual = _digest({key: value for key, value in manifest.items() if key != "sha256"})
    if actual != manifest["sha256"]:
        raise ArtifactError(
            f"{path}: SHA-256 {actual} of its contents, but it says {manifest['sha256']}; it was altered"
        )
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    return sha256_text(json.dumps(manifest, sort_keys=True))


def size_problems(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """Files that a manifest describes and that are missing or not of the described size, one line each."""
    problems = []
    for name, facts in files.items():
        path = folder / name
        if Path(name).name != name:
            problems.append(f"{folder / NAME}: names {name!r}, which is not a file beside it")
        elif not path.is_file():
            problems.append(f"{path}: missing; {NAME} names it with {facts['size']} bytes")
        elif path.stat().st_size != facts["size"]:
            problems.append(f"{path}: {path.stat().st_size} bytes, {NAME} says {facts['size']}")
    return problems


def digest_problems(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """Files of the described size with another SHA-256 than described, one line each. Reads them all."""
    problems = []
    for name, facts in files.items():
        digest = sha256_file(folder / name)
        if digest != facts["sha256"]:
            problems.append(f"{folder / name}: SHA-256 {digest}, {NAME} says {facts['sha256']}")
    return problems


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """Checks that every file of a checkpoint is there with its size; returns the manifest.

    Raises:
        ArtifactError: Names every file that is not, with the promised and the actual size.
    """
    manifest = read_manifest(folder)
    _refuse(size_problems(folder, manifest["files"]))
    return manifest


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """As `check_checkpoint`, and reads every file to compare its SHA-256; names all files with problems."""
    manifest = read_manifest(folder)
    files = manifest["files"]
    wrong = {name: size_problems(folder, {name: facts}) for name, facts in files.items()}
    readable = {name: facts for name, facts in files.items() if not wrong[name]}
    _refuse([*(problem for found in wrong.values() for problem in found), *digest_problems(folder, readable)])
    return manifest


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ArtifactError("\n".join(problems))


def warn_of_broken(folder: Path, error: InputError) -> None:
    """Says that a checkpoint is passed over, and why."""
    _log.warning("%s is not whole and is passed over: %s", folder, error)
