"""`tspin run --repair`: what of a run's finished stages is damaged goes, so that it is made again.

Everything a run makes follows from what it read, so what is made again has the bytes that it had, and stages that came
after still hold. Inputs from outside of the run are never touched: where one changed, the run is refused as ever.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_tspin.checkpoint import manifest
from megatron_tspin.config import Config
from megatron_tspin.data.indexed import open_documents
from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger
from megatron_tspin.run_folder import file_of, shard_digest, shard_paths, shard_settings, step_folders
from megatron_tspin.selfplay import markers
from megatron_tspin.selfplay.plan import Stage, plan
from megatron_tspin.storage import read_text, sha256_file

_DOCUMENT = "_document.json"

logger = get_logger(__name__)


def damaged_stages(config: Config) -> dict[str, list[Path]]:
    """What is no longer as a finished stage wrote it, by the stage's name; hashes everything once.

    A stage whose marker itself cannot be read counts as damaged by it.
    """
    found: dict[str, list[Path]] = {}
    for stage in plan(config):
        if markers.is_done(stage, Path(config.run_dir)):
            paths = list(dict.fromkeys(_damage(stage, config)))
            if paths:
                found[stage.name] = paths
    return found


def remove_damage(config: Config) -> None:
    """Removes what is damaged, and the markers of the stages that wrote it, which run again."""
    run_dir = Path(config.run_dir)
    stages = {stage.name: stage for stage in plan(config)}
    for name, paths in damaged_stages(config).items():
        stage = stages[name]
        logger.warning("stage %s is run again: damaged: %s", name, ", ".join(map(str, paths)))
        markers.marker_file(run_dir, stage).unlink(missing_ok=True)
        if name.startswith("train") and not all(path in step_folders(path.parent) for path in paths):
            paths = list(stage.outputs)  # a finished iteration writes its other files only while it trains
        for path in paths:
            remove(path)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _damage(stage: Stage, config: Config) -> Iterator[Path]:
    run_dir = Path(config.run_dir)
    marker_file = markers.marker_file(run_dir, stage)
    try:
        recorded = markers.read_marker(marker_file)["outputs"]
        released = markers.released_outputs(run_dir)
    except InputError:
        yield marker_file
        return
    for output in stage.outputs:
        if not any(output.is_relative_to(each) for each in released):
            yield from _inside(output)
    current = markers.digests(stage.outputs, run_dir)
    for name in sorted({*recorded, *current}):
        path = run_dir / name
        if recorded.get(name) != current.get(name) and not any(path.is_relative_to(each) for each in released):
            yield path.parent if path.name == manifest.NAME else path


def _inside(output: Path) -> Iterator[Path]:
    """Damage that the digests of a marker do not show: they are those of manifests, summaries and sidecars."""
    if output.name.endswith(_DOCUMENT):
        stem = output.with_name(output.name.removesuffix(_DOCUMENT))
        if not _opens(stem):
            yield from (file_of(stem, kind) for kind in ("bin", "idx", "json"))
    elif shard_settings(output).is_file():
        yield from (shard for shard in shard_paths(output) if not _is_whole(shard))
    elif (output / manifest.NAME).is_file():
        yield from _broken(output)
    elif steps := step_folders(output):
        yield from _broken(steps[-1])


def _opens(stem: Path) -> bool:
    try:
        open_documents(stem)
    except InputError:
        return False
    return True


def _is_whole(shard: Path) -> bool:
    digest = shard_digest(shard)
    return digest.is_file() and read_text(digest).strip() == sha256_file(shard)


def _broken(checkpoint: Path) -> Iterator[Path]:
    try:
        manifest.verify_checkpoint(checkpoint)
    except InputError:
        yield checkpoint


def is_of_the_run(changed: list[str]) -> bool:
    """Whether lines of `markers.differences` name files of the run alone."""
    names = [line.partition(": SHA-256 was")[0] for line in changed]
    return not any(Path(name).is_absolute() or name == markers.RESULT_SETTINGS for name in names)
