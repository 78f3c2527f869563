"""run.yaml: the resolved config of a run. Once a stage is done, what affects results does not change any more."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_tspin.config import CHAT_TEMPLATE, Config
from megatron_tspin.config_section import Affects
from megatron_tspin.config_source import THIS_FOLDER, dump_config, load_config, settings
from megatron_tspin.data.tokenizer_loading import asks_for_the_date
from megatron_tspin.errors import InputError
from megatron_tspin.log import get_logger
from megatron_tspin.objective.packing import row_packing
from megatron_tspin.run_folder import RunFolder
from megatron_tspin.storage import sha256_text, write_text

_CUT = "training.over_capacity cuts"

logger = get_logger(__name__)


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
    _change(tree["generation"], "vllm_python", absolute)
    _change(tree["evaluation"], "scorer", absolute_scorer)
    return Config.model_validate(tree)


def with_template_date(config: Config, today: str) -> Config:
    """The config with a date for a chat template that asks for one: the run's own, so that every day gives the same.

    Args:
        config: With absolute paths.
        today: Taken where neither the config nor the run has one, as 2026-01-31.
    """
    data = config.data
    location = Path(config.model.tokenizer or config.model.hf_checkpoint)
    if data.template != CHAT_TEMPLATE or data.template_date is not None or not asks_for_the_date(location):
        return config
    before = _config_so_far(config)
    date = (before.data.template_date if before else None) or today
    return config.model_copy(update={"data": data.model_copy(update={"template_date": date})})


def _change(section: dict[str, Any], name: str, change: Callable[[str], str]) -> None:
    if section[name] is not None:
        section[name] = change(section[name])


def check_same_config(config: Config) -> None:
    """Refuses to continue a run towards other results than it began with. Until a stage is done all may still change.

    Raises:
        InputError: Settings that affect results differ from run.yaml's; one line for each.
    """
    before = _config_so_far(config)
    if before is None:
        return
    changed = [line for line, affects in _changes(before, config) if affects == "result"]
    if changed:
        head = f"{RunFolder(Path(config.run_dir)).config}: the run began with other settings:"
        tail = "  go back to them to continue the run, or use another --run-dir for a new one"
        raise InputError("\n".join([head, *changed, tail]))


def _config_so_far(config: Config) -> Config | None:
    """What run.yaml holds; None while it binds nothing."""
    path = RunFolder(Path(config.run_dir)).config
    is_begun = path.exists() and _has_done_a_stage(path.parent)
    return load_config(path, {"run_dir": config.run_dir}) if is_begun else None


def _changes(before: Config, now: Config) -> Iterator[tuple[str, Affects]]:
    """A line for each setting that differs, and what it affects."""
    old, new = before.model_dump(), now.model_dump()
    for item in settings():
        was, becomes = _leaf(old, item.path), _leaf(new, item.path)
        if was != becomes:
            shrinks = item.affects == "extent" and becomes < was
            yield f"  {item.name}: {was!r} in the run, {becomes!r} now", "result" if shrinks else item.affects
    if (was := _cut(before)) != (becomes := _cut(now)):
        yield f"  {_CUT}: {was} in the run, {becomes} now", "result"


def _leaf(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = tree
    for name in path:
        value = value[name]
    return value


def _cut(config: Config) -> str:
    """What `over_capacity = truncate` leaves of a triplet, which then depends on how rows are laid out."""
    if config.training.over_capacity != "truncate":
        return "nothing"
    packing = row_packing(config)
    if packing is None:
        return "nothing, rows are padded"
    return f"triplets to {packing.capacity} tokens, prompts {'shared' if packing.share_prompts else 'not shared'}"


def result_digest(config: Config) -> str:
    """Hex SHA-256 of the settings that affect results; the same for every way to execute a run."""
    tree = config.model_dump()
    fixed = {item.name: _leaf(tree, item.path) for item in settings() if item.affects == "result"}
    return sha256_text(json.dumps({**fixed, _CUT: _cut(config)}, sort_keys=True))


def execution_settings(config: Config) -> dict[str, Any]:
    """The settings that only affect how a stage is executed, by dotted name."""
    tree = config.model_dump()
    return {item.name: _leaf(tree, item.path) for item in settings() if item.affects == "execution"}


def added_iterations(config: Config) -> range:
    """Self-play iterations that run.yaml does not have yet and the config asks for; empty for a run not begun."""
    before = _config_so_far(config)
    return range(before.self_play.iterations if before else config.self_play.iterations, config.self_play.iterations)


def write_config(config: Config) -> None:
    """Writes run.yaml, from which the stages take their settings. It changes only in what affects no result.

    Raises:
        InputError: As `check_same_config`.
    """
    check_same_config(config)
    path, before = RunFolder(Path(config.run_dir)).config, _config_so_far(config)
    if before == config:
        return
    for line, _ in _changes(before, config) if before else ():
        logger.info("%s:%s", path, line)
    write_text(path, dump_config(config.model_copy(update={"run_dir": THIS_FOLDER})))


def _has_done_a_stage(run_dir: Path) -> bool:
    return any(RunFolder(run_dir).markers.glob("*.json"))
