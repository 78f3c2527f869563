"""YAML as people mean it: the core schema of YAML 1.2, and no key twice."""

import re
from typing import Any

import yaml

from megatron_tspin.errors import InputError


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML document.

    Args:
        text: The document.
        source: What an error message says it is, such as the file's path.

    Raises:
        InputError: It is not YAML, or a mapping has a key twice; names the lines.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except _RepeatedKeyError as error:
        raise InputError(f"{source}: {error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error


def format_yaml(value: Any) -> str:
    """A value as a YAML document that `parse_yaml` and YAML 1.1's readers understand alike."""
    # PyYAML would write U+0085 as it is, and read it as a line break.
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode="\\x85" not in repr(value))
    return text


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, where `1e-6` is text, `010` is eight, `1:30` is ninety and a later key wins silently.

    The resolvers are those of YAML 1.2.2, section 10.3.2, with two things of YAML 1.1: `yes`, `no`, `on` and `off` are
    still booleans, and merge keys (`<<`) still work.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        first: dict[Any, yaml.Mark] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            name = self.construct_object(key)
            if name in first:
                at, again = first[name].line + 1, key.start_mark.line + 1
                raise _RepeatedKeyError(
                    f"`{name}` stands in line {at} and again in line {again}; leave one of them out"
                )
            first[name] = key.start_mark
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """A whole number; PyYAML's own reads `010` as eight."""
        text = str(node.value)
        return int(text, 0) if text.startswith(("0x", "0o")) else int(text)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that only the loader would take for numbers, besides those that YAML 1.1 would."""


class _RepeatedKeyError(yaml.YAMLError):
    """A key stands in a mapping twice."""


def _resolve(kind: str, pattern: str, first: str) -> None:
    """Plain texts of a pattern are of a kind; `first` are the characters that they may begin with."""
    for owner in (_Loader, _Dumper):
        tag = f"tag:yaml.org,2002:{kind}"
        owner.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), list(first) or [""])


_resolve("null", "", "")
_resolve("null", "~|null|Null|NULL", "~nN")
_resolve("bool", "true|True|TRUE|yes|Yes|YES|on|On|ON", "tTyYoO")
_resolve("bool", "false|False|FALSE|no|No|NO|off|Off|OFF", "fFnNoO")
_resolve("int", "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789")
_resolve(
    "float",
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "-+.0123456789",
)
_resolve("merge", "<<", "<")
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)
