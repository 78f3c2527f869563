"""Where a config comes from: a YAML file and command-line flags, merged, then validated in one go."""

import argparse
import difflib
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megatron_tspin.config import Config
from megatron_tspin.config_section import Affects, Section
from megatron_tspin.errors import InputError
from megatron_tspin.run_folder import RunFolder
from megatron_tspin.storage import read_text
from megatron_tspin.yaml_source import format_yaml, parse_yaml

_ASSIGNMENTS = "assignments"
_GIVEN = "given_options"
THIS_FOLDER = "."
"""The `run_dir` of the run.yaml in a run's own folder."""


_CHECKS = {"optimizer": Config.check_batches, "generation": Config.check_generation}
"""Combinations that matter only to commands that read a section, by that section."""


@dataclass(frozen=True)
class Setting:
    """One leaf of the config tree."""

    path: tuple[str, ...]
    flag: str | None
    affects: Affects
    field: FieldInfo

    @property
    def name(self) -> str:
        """Dotted name, as in error messages: `optimizer.lr`."""
        return ".".join(self.path)


class StoreOnce(argparse.Action):
    """Stores an option's value, and refuses a second one: argparse alone would let the last one win silently."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Called by argparse where the option stands."""
        _refuse_twice(self, namespace)
        setattr(namespace, self.dest, values)


class _BooleanOnce(argparse.BooleanOptionalAction):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        _refuse_twice(self, namespace)
        super().__call__(parser, namespace, values, option_string)


def _refuse_twice(action: argparse.Action, namespace: argparse.Namespace) -> None:
    """Raises argparse's error if the command line has the option already."""
    given: set[str] = namespace.__dict__.setdefault(_GIVEN, set())
    if action.dest in given:
        raise argparse.ArgumentError(action, "given twice; leave one of them out")
    given.add(action.dest)


def settings(section: type[Section] = Config, prefix: tuple[str, ...] = ()) -> Iterator[Setting]:
    """All leaves of the config tree, in order."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from settings(field.annotation, (*prefix, name))
        else:
            extra = typing.cast(dict[str, Any], field.json_schema_extra)
            yield Setting((*prefix, name), extra["flag"], extra["affects"], field)


def add_flags(parser: argparse.ArgumentParser, only: Iterable[str] | None = None) -> None:
    """Adds a flag for each setting, grouped by section.

    Args:
        parser: Receives the flags. Those not given on the command line are absent from the namespace.
        only: Names of the sections to offer ("" for the settings outside any); None offers all.
    """
    wanted = None if only is None else set(only)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for item in settings():
        section = item.path[0] if len(item.path) > 1 else ""
        if item.flag is None or (wanted is not None and section not in wanted):
            continue
        if section not in groups:
            annotation = Config.model_fields[section].annotation if section else None
            title = (annotation.__doc__ or "").splitlines()[0].rstrip(".") if annotation else "the run"
            groups[section] = parser.add_argument_group(f"{section or 'run'}: {title}")
        groups[section].add_argument(item.flag, dest=item.name, default=argparse.SUPPRESS, **_flag_options(item.field))


def _flag_options(field: FieldInfo) -> dict[str, Any]:
    """Options of argparse's `add_argument` for a field."""
    annotation = _without_none(field.annotation)
    default = f" [{field.default}]" if not field.is_required() and field.default not in (None, []) else ""
    options: dict[str, Any] = {
        "action": StoreOnce,
        "help": f"{field.description or ''}{default}".replace("%", "%%").replace("\n", "\\n"),
    }
    if annotation is bool:
        options["action"] = _BooleanOnce
    elif typing.get_origin(annotation) is Literal:
        options["choices"] = typing.get_args(annotation)
    elif typing.get_origin(annotation) is list:
        options |= {"type": typing.get_args(annotation)[0], "nargs": "+", "metavar": "X"}
    else:
        options |= {"type": annotation, "metavar": str(getattr(annotation, "__name__", "value")).upper()}
    return options


def _without_none(annotation: Any) -> Any:
    """`T` of `T | None`."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def add_assignments(parser: argparse.ArgumentParser) -> None:
    """Adds `--set`, which reaches every setting, whether it has a flag or not."""
    fine = ", ".join(f"{item.name} [{item.field.default}]" for item in settings() if item.flag is None)
    parser.add_argument(
        "--set",
        dest=_ASSIGNMENTS,
        action="append",
        metavar="SECTION.KEY=VALUE",
        help=f"any setting of the config, VALUE as in the file; may be repeated; those without a flag are {fine}",
    )


def overrides(namespace: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line, as flags or with `--set`, by dotted name.

    Raises:
        InputError: A `--set` names no setting or is not YAML, or a setting is given twice.
    """
    names = {item.name for item in settings()}
    given = {name: value for name, value in vars(namespace).items() if name in names}
    for text in getattr(namespace, _ASSIGNMENTS, None) or ():
        name, value = _assignment(text, names)
        if name in given:
            raise InputError(f"--set {text}: {name} is given twice on the command line; leave one of them out")
        given[name] = value
    return given


def _assignment(text: str, names: Iterable[str]) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals:
        raise InputError(f"--set {text}: expected SECTION.KEY=VALUE, such as optimizer.lr=1e-6")
    if name not in names:
        raise InputError(f"--set {text}: {_unknown(name)}")
    return name, parse_yaml(value, f"--set {text}")


def load_config(path: Path | None, flags: Mapping[str, Any], unread: Collection[str] = ()) -> Config:
    """Reads a YAML file, applies flags and validates.

    Args:
        path: The YAML file; None starts from the defaults. A `run_dir` of `.` is the file's own folder, so that a
            run is where its run.yaml lies; any other relative path is taken from the working folder.
        flags: Settings of the command line by dotted name, stronger than the file.
        unread: Sections, and settings by dotted name, that the command never reads. Whatever is said about them is left
            out: they have their defaults, required settings are empty, and nothing of them is refused.

    Raises:
        InputError: The file is missing or no YAML mapping, it is the run.yaml of a run but names another folder, or
            settings are refused; all of them in one message.
    """
    tree = {} if path is None else read_yaml(path)
    if path is not None and "run_dir" not in flags:
        _place_run(tree, path)
    for name, value in flags.items():
        _set(tree, name, value)
    for name in unread:
        _leave_out(tree, name)
    source = "the command line" if path is None else str(path)
    try:
        config = Config.model_validate(tree)
        for section, check in _CHECKS.items():
            if section not in unread:
                check(config)
    except ValidationError as error:
        raise InputError("\n".join(_explain(source, item) for item in error.errors())) from error
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    return config


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    """Puts a setting into a tree of settings, by its dotted name."""
    *parents, leaf = name.split(".")
    node: Any = tree
    for parent in parents:
        if node.get(parent) is None:  # absent, or a heading without settings
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            return  # refused later, as the file wrote it
    node[leaf] = value


def _place_run(tree: dict[str, Any], path: Path) -> None:
    """Lets a run be where its run.yaml lies, also after it was moved or copied."""
    folder, named = path.absolute().parent, tree.get("run_dir")
    if named == THIS_FOLDER:
        tree["run_dir"] = str(folder)
    elif isinstance(named, str) and RunFolder(folder).markers.is_dir() and Path(named).absolute() != folder:
        raise InputError(
            f"{path}: lies in the folder of a run, but its run_dir is {named}; to go on with the run in {folder} set "
            f"`run_dir: {THIS_FOLDER}` there, or name the one that is meant with --run-dir"
        )


def _leave_out(tree: dict[str, Any], name: str) -> None:
    """Takes a section or a setting out of a tree of settings; a required setting, always a text, becomes empty."""
    section, _, leaf = name.rpartition(".")
    kind: Any = Config.model_fields[section].annotation if section else Config
    node = tree.setdefault(section, {}) if section else tree
    if not isinstance(node, dict):  # refused as the file wrote it
        return
    if kind.model_fields[leaf].is_required():
        node[leaf] = ""
    else:
        node.pop(leaf, None)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping; raises InputError if the file is missing or is none."""
    if not path.is_file():
        raise InputError(f"{path}: no such config file")
    tree = parse_yaml(read_text(path), str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected sections such as `model:` and `data:`, found {type(tree).__name__}")
    return tree


def _explain(source: str, item: Any) -> str:
    """One line for one refused setting."""
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        if len(item["loc"]) == 1 and name in {leaf.name for leaf in settings()}:
            section, _, leaf = name.partition(".")
            return f"{source}: unknown setting `{name}`; write `{section}:` and below it, indented, `{leaf}:`"
        return f"{source}: {_unknown(name)}"
    if item["type"] == "missing":
        required = [leaf for leaf in settings() if leaf.field.is_required()]
        flags = [leaf.flag for leaf in required if leaf.flag and (leaf.name == name or leaf.path[0] == name)]
        return f"{source}: `{name}` is missing; set it in the file" + (f" or with {', '.join(flags)}" if flags else "")
    message = item["msg"].removeprefix("Value error, ")
    if not name or item["type"] == "value_error":
        return f"{source}: {name + ': ' if name else ''}{message}"
    return f"{source}: `{name}` = {item['input']!r}: {message[0].lower()}{message[1:]}"


def _unknown(name: str) -> str:
    """Says that a dotted name is no setting, and which one may have been meant."""
    known = [leaf.name for leaf in settings()]
    close = difflib.get_close_matches(name, known, n=1) or [
        leaf for leaf in known if leaf.endswith("." + name.split(".")[-1])
    ]
    hint = f"; did you mean `{close[0]}`?" if close else "; see `tspin run --help` for all settings"
    return f"unknown setting `{name}`{hint}"


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every setting written out."""
    return format_yaml(config.model_dump())
