"""Markers: a stage is done when its marker exists and every digest in it equals the file's.

A marker is written last, by rename. A stage without one starts again and resumes inside itself. A stage with one whose
files have changed is never redone silently, because what came after it was made from the files that it names. Of the
settings only those that affect results are bound, as one digest; those of its execution are noted for people.

Outputs that the run released to save space are noted in the marker of the stage that wrote them; they are then neither
missing nor changed for any stage.
"""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_tspin.checkpoint import manifest
from megatron_tspin.config import Config
from megatron_tspin.errors import ArtifactError, InputError
from megatron_tspin.provenance import place, versions
from megatron_tspin.run_folder import RunFolder, shard_summary, step_folders
from megatron_tspin.selfplay.plan import Stage
from megatron_tspin.selfplay.run_config import execution_settings, result_digest
from megatron_tspin.storage import read_json, sha256_file, write_json

_POLICY_SUFFIXES = (".json", ".safetensors", ".model", ".jinja")

RESULT_SETTINGS = "run.yaml (settings that affect results)"
_FIELDS = {"config", "execution", "inputs", "outputs", "released"}

Digests = dict[str, str | None]


def marker_file(run_dir: Path, stage: Stage) -> Path:
    """Where the marker of a stage is."""
    return RunFolder(run_dir).marker(stage.name)


def identity_files(path: Path) -> list[Path]:
    """The files whose digests stand for an input or output.

    A checkpoint folder is its manifest.json, a folder of shards its summary.json, a folder of checkpoints (`step_*`)
    the manifest of the last one; any other folder (an HF checkpoint, a tokenizer) is its JSON, safetensors,
    SentencePiece and template files. What is missing stands for itself.
    """
    for file in (path / manifest.NAME, shard_summary(path)):
        if file.is_file():
            return [file]
    if not path.is_dir():
        return [path]
    steps = [file for folder in step_folders(path) if (file := folder / manifest.NAME).is_file()]
    if steps:
        return [steps[-1]]
    return sorted(file for file in path.iterdir() if file.suffix in _POLICY_SUFFIXES and file.is_file()) or [path]


def digests(paths: Iterable[Path], run_dir: Path) -> Digests:
    """Hex SHA-256 by path, relative to the run where it lies inside; None where the file is missing."""
    files = sorted({file for path in paths for file in identity_files(path)})
    return {_name(file, run_dir): _digest(file) for file in files}


def _name(file: Path, run_dir: Path) -> str:
    return str(file.relative_to(run_dir)) if file.is_relative_to(run_dir) else str(file)


def _digest(file: Path) -> str | None:
    if not file.is_file():
        return None
    entry = file.stat()
    return _remembered_digest(file, entry.st_size, entry.st_mtime_ns, entry.st_ino)


@functools.lru_cache(maxsize=4096)
def _remembered_digest(file: Path, size: int, modified: int, inode: int) -> str:
    """A checkpoint's weights are read once in a driver's life, not once for each stage that names them."""
    return sha256_file(file)


def missing_outputs(stage: Stage, run_dir: Path) -> list[str]:
    """Outputs that do not exist."""
    return [name for name, digest in digests(stage.outputs, run_dir).items() if digest is None]


def write_marker(
    stage: Stage, config: Config, command: list[str], inputs: Digests, started: str, seconds: float
) -> None:
    """Declares a stage done.

    Args:
        stage: The stage whose processes ended well.
        config: The run.
        command: Its command line.
        inputs: Digests of its inputs, taken before it started.
        started: When it started, ISO 8601.
        seconds: How long it took.
    """
    run_dir = Path(config.run_dir)
    write_json(
        marker_file(run_dir, stage),
        {
            "stage": stage.name,
            "command": command,
            "config": result_digest(config),
            "execution": execution_settings(config),
            "inputs": inputs,
            "outputs": digests(stage.outputs, run_dir),
            "released": [],
            "started": started,
            "seconds": round(seconds, 3),
            "versions": versions(),
            "place": place(),
        },
    )


def read_marker(path: Path) -> dict[str, Any]:
    """Reads the marker of a done stage.

    Raises:
        ArtifactError: It is none, or one of an earlier version of this project.
    """
    marker = read_json(path)
    if not isinstance(marker, dict) or not all(isinstance(marker.get(name), dict) for name in ("inputs", "outputs")):
        raise ArtifactError(f"{path}: not a marker of this project; remove it to run the stage again")
    if missing := _FIELDS - set(marker):
        raise ArtifactError(
            f"{path}: has no {', '.join(sorted(missing))}, as markers of earlier versions; finish the run with the "
            "version that began it, or start again with another --run-dir"
        )
    if not isinstance(marker["released"], list):
        raise ArtifactError(f"{path}: `released` must be a list of paths, found {marker['released']!r}; it was altered")
    return marker


def record_release(run_dir: Path, stage: Stage, outputs: Path) -> None:
    """Notes that outputs of a done stage are no longer kept; to be called before the first of their files goes."""
    marker = read_marker(marker_file(run_dir, stage))
    released = sorted({*marker["released"], _name(outputs, run_dir)})
    write_json(marker_file(run_dir, stage), {**marker, "released": released})


def released_outputs(run_dir: Path) -> list[Path]:
    """Files and folders of the run that it no longer keeps."""
    there = sorted(RunFolder(run_dir).markers.glob("*.json"))
    names = [name for path in there for name in read_marker(path)["released"]]
    return [run_dir / name for name in names]


def is_done(stage: Stage, run_dir: Path) -> bool:
    """Whether a stage has a marker; see `differences` for whether it still holds."""
    return marker_file(run_dir, stage).is_file()


def differences(stage: Stage, config: Config) -> list[str]:
    """One line for each file that is no longer what the marker of a done stage says; empty when all are.

    Raises:
        ArtifactError: A marker itself cannot be read.
    """
    run_dir = Path(config.run_dir)
    marker = read_marker(marker_file(run_dir, stage))
    recorded: Digests = {**marker["inputs"], **marker["outputs"]}
    current = digests((*stage.inputs, *stage.outputs), run_dir)
    # What was recorded counts even where today's settings no longer ask for it, such as a measurement; what only they
    # ask for and is not there does not.
    current |= {name: _digest(run_dir / name) for name in recorded if name not in current}
    released = released_outputs(run_dir)
    names = [
        name
        for name in {*recorded, *current}
        if not any(run_dir.joinpath(name).is_relative_to(each) for each in released)
    ]
    recorded[RESULT_SETTINGS], current[RESULT_SETTINGS] = marker["config"], result_digest(config)
    return [
        f"{name}: SHA-256 was {_shown(recorded.get(name))} when the stage ended, is {_shown(current.get(name))} now"
        for name in sorted([*names, RESULT_SETTINGS])
        if recorded.get(name) != current.get(name)
    ]


def _shown(digest: str | None) -> str:
    return digest or "that of no file"


def refusal(stage: Stage, run_dir: Path, changed: list[str]) -> InputError:
    """Says why a stage whose files changed is neither trusted nor redone."""
    lines = [f"{run_dir}: stage {stage.name} is done, but a file it read or wrote has changed:"]
    lines += [f"  {line}" for line in changed]
    lines.append(
        "  what came after was made from the old file; put that one back, let `tspin run --repair` make a damaged file "
        "of the run again, or start again with another --run-dir"
    )
    return InputError("\n".join(lines))
