"""`manifest.json`: what makes a checkpoint whole. No torch here, so the driver can look at checkpoints too."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_tspin.errors import ArtifactError, InputError
from megatron_tspin.log import get_logger
from megatron_tspin.storage import fsync_path, read_json, sha256_file, sha256_text

NAME = "manifest.json"
FORMAT = 1
_FIELDS = {"format", "facts", "state", "files", "sha256"}
_STEP_FOLDER = re.compile(r"^step_\d{8}$")
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


def check_files(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with files that a manifest describes, one line each."""
    return [
        problem for name, facts in files.items() for problem in [_check_file(folder / name, name, facts)] if problem
    ]


def _check_file(path: Path, name: str, facts: dict[str, Any]) -> str | None:
    if Path(name).name != name:
        return f"{path.parent / NAME}: names {name!r}, which is not a file beside it"
    if not path.is_file():
        return f"{path}: missing; {NAME} names it with {facts['size']} bytes"
    size = path.stat().st_size
    if size != facts["size"]:
        return f"{path}: {size} bytes, {NAME} says {facts['size']}"
    digest = sha256_file(path)
    if digest != facts["sha256"]:
        return f"{path}: SHA-256 {digest}, {NAME} says {facts['sha256']}"
    return None


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Checks that every file of a checkpoint is there with its size and SHA-256; returns the manifest.

    Raises:
        ArtifactError: Names every file that is not, with the promised and the actual value.
    """
    manifest = read_manifest(folder)
    problems = check_files(folder, manifest["files"])
    if problems:
        raise ArtifactError("\n".join(problems))
    return manifest


def latest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint of the highest step in a folder (`step_` and its number); None if there is none.

    Broken ones are passed over with a warning that says what is wrong. Nothing but the manifests is trusted.
    """
    return newest(folder, verify_checkpoint)


def newest(folder: Path, verify: Callable[[Path], Any]) -> Path | None:
    """As `latest_checkpoint`, with another judge of what is whole."""
    if not folder.is_dir():
        return None
    for candidate in sorted((path for path in folder.iterdir() if _STEP_FOLDER.match(path.name)), reverse=True):
        try:
            verify(candidate)
        except InputError as error:
            _log.warning("%s is not whole and is passed over: %s", candidate, error)
        else:
            return candidate
    return None
