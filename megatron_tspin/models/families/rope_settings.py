"""Rope settings of a config.json, whichever version of transformers wrote it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron_tspin.models.architecture import Rope
from megatron_tspin.models.families.config_reader import ConfigReader, is_positive

_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_KNOWN = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate", "short_factor", "long_factor", "short_mscale", "long_mscale", "max_position_embeddings",
}  # fmt: skip
"""What transformers' own rope functions read, which compute the frequencies."""
_FROM_ORIGINAL = ("llama3", "yarn", "longrope")
"""Types that stretch the positions of an original model."""


def rope_settings(config: Mapping[str, Any], default_theta: float = 10000.0) -> dict[str, Any]:
    """Under transformers 5's names (`rope_parameters`)."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    settings["rope_type"] = settings.get("rope_type") or settings.pop("type", None) or "default"
    settings.pop("type", None)
    settings.setdefault("rope_theta", config.get("rope_theta", default_theta))
    return settings


def read_rope(
    reader: ConfigReader,
    head_dim: int,
    max_positions: int,
    default_theta: float = 10000.0,
    default_partial: float | None = None,
    keys: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
    old_types: Mapping[str, str] = MappingProxyType({}),
) -> Rope:
    """The one rope of a network.

    Args:
        reader: Of the config.
        head_dim: Columns of a head.
        max_positions: What `original_max_position_embeddings` is where the config is silent.
        default_theta: What theta is where the config is silent.
        default_partial: The same for the share of a head's columns that is rotated; None: this family rotates all.
        keys: The config's names of theta and of that share.
        old_types: Names that the family once used for types.
    """
    theta, share = keys
    stated = {"rope_theta": reader.raw(theta, default_theta)}
    stated |= {key: reader.table(key) for key in ("rope_parameters", "rope_scaling")}
    settings = rope_settings(stated, default_theta)
    settings["rope_type"] = old_types.get(settings["rope_type"], settings["rope_type"])
    beside = reader.raw(share)
    silent = 1.0 if default_partial is None else default_partial
    partial = settings.pop("partial_rotary_factor", silent if beside is None else beside)
    if not is_positive(partial, whole=False) or partial > 1:
        reader.refuse(f"{share} = {partial!r} must be a number above 0 and at most 1")
        partial = 1.0
    if partial != 1.0 and default_partial is None:
        reader.refuse(f"{share} = {partial} is not implemented")
    return make_rope(reader, settings, int(head_dim * partial), max_positions)


def read_ropes_by_layer_type(
    reader: ConfigReader, head_dim: int, max_positions: int, kinds: Mapping[str, tuple[str, float]]
) -> tuple[Rope, ...]:
    """Several ropes, named by the layers that have them.

    Args:
        reader: Of the config.
        head_dim: Columns of a head.
        max_positions: See `read_rope`.
        kinds: For each layer type the key of its theta in old configs, and what theta is where the config is silent.
            There `rope_scaling` is of the first one.
    """
    nested, old = reader.table("rope_parameters") or {}, reader.table("rope_scaling")
    thetas = {name: reader.raw(key, theta) for name, (key, theta) in kinds.items()}
    if others := sorted(set(nested) - set(kinds)):
        reader.refuse(f"rope_parameters has {', '.join(others)}; implemented are {', '.join(kinds)}")
    found = []
    for number, (name, theta) in enumerate(thetas.items()):
        scaling = nested.get(name) or (old if number == 0 else None) or {}
        found.append(make_rope(reader, rope_settings({"rope_scaling": scaling}, theta), head_dim, max_positions, name))
    return tuple(found)


def make_rope(
    reader: ConfigReader, settings: dict[str, Any], columns: int, max_positions: int, layer_type: str | None = None
) -> Rope:
    """Checks settings that stand under transformers 5's names.

    Args:
        reader: Collects what is wrong.
        settings: `rope_type`, `rope_theta` and the rest.
        columns: Rotated columns of a head.
        max_positions: See `read_rope`.
        layer_type: See `Rope`.
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    kind, theta = settings["rope_type"], settings.get("rope_theta")
    if kind not in _TYPES:
        reader.refuse(f"rope type {kind!r} is not implemented; implemented are {', '.join(_TYPES)}")
    if kind in _FROM_ORIGINAL:
        settings.setdefault("original_max_position_embeddings", max_positions)
    if theta is not None and is_positive(theta, whole=False):
        settings["rope_theta"] = float(theta)
    else:
        reader.refuse(f"rope_theta = {theta!r} must be a number above 0")
    for key in sorted(set(settings) - _KNOWN):
        reader.refuse(f"`{key}` = {settings[key]!r} among the rope settings is not understood")
    if columns % 2:
        reader.inconsistent(f"heads of {columns} columns have no rotary halves; needs even ones")
    return Rope(settings, columns, layer_type)
