"""run.yaml: the resolved config of a run, which does not change once a stage is done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_tspin.config import Config
from megatron_tspin.config_source import dump_config, load_config, settings
from megatron_tspin.errors import InputError
from megatron_tspin.run_folder import RunFolder
from megatron_tspin.storage import write_text


def with_absolute_paths(config: Config, base: Path) -> Config:
    """The config with every relative path taken from `base`, so that a stage can be run by hand from any folder."""

    def absolute(path: str) -> str:
        return str(base.absolute() / Path(path).expanduser())

    def absolute_scorer(scorer: str) -> str:
        path, colon, function = scorer.rpartition(":")
        return f"{absolute(path)}{colon}{function}" if path.endswith(".py") else scorer

    tree = config.model_dump()
    _change(tree, "run_dir", absolute)
    _change(tree["model"], "hf_checkpoint", absolute)
    _change(tree["model"], "tokenizer", absolute)
    _change(tree["data"], "annotated", absolute)
    _change(tree["data"], "held_out", absolute)
    _change(tree["evaluation"], "scorer", absolute_scorer)
    return Config.model_validate(tree)


def _change(section: dict[str, Any], name: str, change: Callable[[str], str]) -> None:
    if section[name] is not None:
        section[name] = change(section[name])


def check_same_config(config: Config) -> None:
    """Refuses to continue a run with other settings than it began with. Until a stage is done they may still change.

    Raises:
        InputError: run.yaml differs; one line for each setting.
    """
    path = RunFolder(Path(config.run_dir)).config
    if not path.exists() or not _has_done_a_stage(path.parent):
        return
    old, new = load_config(path, {}).model_dump(), config.model_dump()
    changed = [
        f"  {item.name}: {_leaf(old, item.path)!r} in the run, {_leaf(new, item.path)!r} now"
        for item in settings()
        if _leaf(old, item.path) != _leaf(new, item.path)
    ]
    if changed:
        head = f"{path}: the run began with other settings:"
        tail = "  go back to them to continue the run, or use another --run-dir for a new one"
        raise InputError("\n".join([head, *changed, tail]))


def _leaf(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = tree
    for name in path:
        value = value[name]
    return value


def write_config(config: Config) -> None:
    """Writes run.yaml, once and for all as soon as a stage is done: markers hold its digest."""
    check_same_config(config)
    path = RunFolder(Path(config.run_dir)).config
    if not path.exists() or not _has_done_a_stage(path.parent):
        write_text(path, dump_config(config))


def _has_done_a_stage(run_dir: Path) -> bool:
    return any(RunFolder(run_dir).markers.glob("*.json"))
