"""The stages of a run, in order: what each one runs, reads and writes. No file is opened."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tspin.config import Config
from megatron_tspin.data.sources import example_files
from megatron_tspin.errors import InputError
from megatron_tspin.objective.roles import has_reference, stored_roles
from megatron_tspin.run_folder import HELD_OUT, TRAIN, RunFolder, document_stem, examples_path, file_of


@dataclass(frozen=True)
class Stage:
    """One group of processes that turns files into files."""

    name: str
    arguments: tuple[str, ...]
    """Command line of `tspin`, subcommand first."""
    world_size: int
    """Number of ranks."""
    inputs: tuple[Path, ...]
    """Files and folders it reads; `markers.identity_files` says which files stand for a folder."""
    outputs: tuple[Path, ...]
    """Files and folders it writes."""
    disposable: bool = False
    """True when its outputs can be made again at any time, so that a changed file is no reason to stop."""


def policy_folder(folder: RunFolder, policy: int) -> Path:
    """Folder with the checkpoint of policy number `policy`; behind the initial one it holds a `step_*` folder."""
    return folder.initial_checkpoint if policy == 0 else folder.checkpoints(policy - 1)


def plan(config: Config) -> list[Stage]:
    """All stages of a run.

    SFT samples nothing, so its rollout stages only evaluate; without held-out data no stage evaluates.
    """
    return list(_stages(config))


def _stages(config: Config) -> Iterator[Stage]:
    last = config.self_play.iterations
    yield _tokenize(config)
    yield _convert(config)
    for iteration in range(last + 1):
        yield _rollout(config, iteration)
        if iteration < last:
            yield _train(config, iteration)
    yield _export(config)
    yield _report(config)


def _folder(config: Config) -> RunFolder:
    return RunFolder(Path(config.run_dir))


def _arguments(config: Config, command: str, *more: str) -> tuple[str, ...]:
    return (command, "--config", str(_folder(config).config), *more)


def _documents(folder: RunFolder, *names: str) -> tuple[Path, ...]:
    """Sidecars of role documents; a sidecar holds the digests of its .bin and .idx."""
    return tuple(file_of(folder.data / name, "json") for name in names)


def _synthetic(folder: RunFolder, iteration: int) -> Path:
    """Sidecar of an iteration's own documents."""
    return file_of(document_stem(folder.iteration(iteration), TRAIN, "synthetic"), "json")


def _files(source: str) -> list[Path]:
    """The files of a source of examples; what cannot be found stands for itself, and preflight tells."""
    try:
        return example_files(Path(source))
    except InputError:
        return [Path(source)]


def _tokenize(config: Config) -> Stage:
    folder = _folder(config)
    inputs = [*_files(config.data.annotated), Path(config.model.tokenizer or config.model.hf_checkpoint)]
    outputs = [examples_path(folder.data, TRAIN), *_documents(folder, "train_prompt", "train_annotated")]
    if config.data.held_out is not None:
        inputs += _files(config.data.held_out)
    if config.data.has_held_out:
        outputs += [examples_path(folder.data, HELD_OUT), *_documents(folder, "held_out_prompt", "held_out_annotated")]
    return Stage("tokenize", _arguments(config, "tokenize"), 1, tuple(inputs), tuple(outputs))


def _convert(config: Config) -> Stage:
    return Stage(
        name="convert",
        arguments=_arguments(config, "convert"),
        world_size=config.parallel.world_size,
        inputs=(Path(config.model.hf_checkpoint),),
        outputs=(_folder(config).initial_checkpoint,),
    )


def _rollout(config: Config, iteration: int) -> Stage:
    folder, roles = _folder(config), stored_roles(config.objective.method)
    inputs = [policy_folder(folder, iteration), *_documents(folder, "train_prompt")]
    outputs: list[Path] = []
    if config.data.has_held_out:
        inputs += [examples_path(folder.data, HELD_OUT), *_documents(folder, "held_out_prompt", "held_out_annotated")]
        inputs += scorer_file(config)
        outputs.append(folder.evaluation(iteration))
    if "proto" in roles and iteration == 0:
        outputs += [folder.proto, *_documents(folder, "train_proto")]
    if "synthetic" in roles and iteration < config.self_play.iterations:
        outputs += [folder.synthetic(iteration), _synthetic(folder, iteration)]
    return Stage(
        name=f"rollout_{iteration:03d}",
        arguments=_arguments(config, "rollout", "--iteration", str(iteration)),
        world_size=config.generation_layout().world_size,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
    )


def _train(config: Config, iteration: int) -> Stage:
    folder, roles = _folder(config), stored_roles(config.objective.method)
    inputs = [policy_folder(folder, iteration), *_documents(folder, "train_prompt", "train_annotated")]
    outputs = [folder.metrics(iteration), folder.checkpoints(iteration)]
    if "synthetic" in roles:
        inputs.append(_synthetic(folder, iteration))
    if "proto" in roles:
        inputs += _documents(folder, "train_proto")
    if has_reference(config.objective.method):
        outputs.append(folder.reference(iteration))
    if config.rescores:
        outputs.append(folder.precision(iteration))
    return Stage(
        name=f"train_{iteration:03d}",
        arguments=_arguments(config, "train", "--iteration", str(iteration)),
        world_size=config.parallel.world_size,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
    )


def _export(config: Config) -> Stage:
    folder = _folder(config)
    return Stage(
        name="export",
        arguments=_arguments(config, "export"),
        world_size=config.parallel.world_size,
        inputs=(policy_folder(folder, config.self_play.iterations), Path(config.model.hf_checkpoint)),
        outputs=(folder.export,),
    )


def _report(config: Config) -> Stage:
    folder, last = _folder(config), config.self_play.iterations
    inputs = [folder.metrics(iteration) for iteration in range(last)]
    if config.rescores:
        inputs += [folder.precision(iteration) for iteration in range(last)]
    if config.data.has_held_out:
        inputs += [folder.evaluation(iteration) for iteration in range(last + 1)]
    return Stage("report", ("report", str(folder.root)), 1, tuple(inputs), (folder.report,), disposable=True)


def scorer_file(config: Config) -> list[Path]:
    """The scorer's file, when it is named by its path."""
    if config.evaluation.scorer is None:
        return []
    path = config.evaluation.scorer.rpartition(":")[0]
    return [Path(path)] if path.endswith(".py") else []
