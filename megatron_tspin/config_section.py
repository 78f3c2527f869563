"""What a section of the config is made of."""

from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Affects = Literal["result", "extent", "execution", "report"]
"""What a setting decides about.

result: What is computed. Fixed once a stage of the run is done.
extent: How far the run goes; may be raised, and what is done stays valid.
execution: How it is computed, the same within rounding. May change whenever the run is continued.
report: What is measured, shown and warned of beside it. May change likewise.
"""


def setting(default: Any, flag: str | None, description: str, *, affects: Affects, **bounds: Any) -> Any:
    """A config field.

    Args:
        default: `...` makes the setting required.
        flag: Its own flag on the command line; None for a fine one, which is set in the file or with `--set`.
        description: For `--help`.
        affects: What it decides about.
        bounds: pydantic's, such as `ge=1`.
    """
    return Field(default, description=description, json_schema_extra={"flag": flag, "affects": affects}, **bounds)


result = partial(setting, affects="result")
execution = partial(setting, affects="execution")
report = partial(setting, affects="report")


class Section(BaseModel):
    """A group of settings: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=False)
