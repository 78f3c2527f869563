"""What a section of the config is made of."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def setting(default: Any, flag: str | None, description: str, **bounds: Any) -> Any:
    """A config field with its flag. `...` as default makes it required; `flag=None` hides it from the command line."""
    return Field(default, description=description, json_schema_extra={"flag": flag}, **bounds)


class Section(BaseModel):
    """A group of settings: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=False)
