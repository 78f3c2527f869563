"""What `tspin checkpoint` prints, as text for people and as values for JSON."""

from collections.abc import Sequence
from itertools import groupby
from math import isfinite
from typing import Any

from megatron_tspin.benchmark.tables import ABSENT, as_text, make_table
from megatron_tspin.checkpoint.comparison import TensorDifference
from megatron_tspin.checkpoint.inspection import Facts
from megatron_tspin.checkpoint.tensor_check import Header

_KINDS = {"hf": "HF folder", "distributed": "distributed checkpoint of this project"}


def facts_text(facts: Facts) -> str:
    """A line for each fact that there is."""
    layout = facts.layout and " x ".join(f"{name.upper()} {size}" for name, size in facts.layout.items())
    source = facts.source if isinstance(facts.source, str | None) else ", ".join(facts.source)
    lines = {
        "kind": _KINDS[facts.kind],
        "family": facts.family,
        "parameters": f"{facts.parameters:,}",
        "per layer": _layers(facts.parameters_per_layer),
        "types": ", ".join(f"{name} ({count} tensors)" for name, count in facts.dtypes.items()),
        "files": f"{facts.files}, {facts.bytes:,} bytes",
        "written by": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        "layout": layout,
        "step": None if facts.step is None else f"{facts.step} of iteration {facts.iteration}",
        "optimizer": None if facts.layout is None else "yes" if facts.optimizer else "no",
        "source": source,
        "its SHA-256": facts.source_digest,
        "SHA-256": facts.digest,
    }
    shown = {name: value for name, value in lines.items() if value}
    width = max(map(len, shown))
    return "".join([f"{facts.folder}\n", *(f"  {name:{width}}  {value}\n" for name, value in shown.items())])


def _layers(parameters: Sequence[int]) -> str:
    """Layers of one size that follow each other are told together."""
    runs = [(size, len(list(same))) for size, same in groupby(parameters)]
    return ", ".join(f"{count} layers of {size:,}" for size, count in runs)


def differences_text(found: Sequence[TensorDifference]) -> str:
    """A table of the tensors that differ, and a last line that sums it up."""
    differing = [each for each in found if each.differs]
    rows = [
        [each.name, _described(each.first), _described(each.second), _number(each.max_abs), _number(each.relative)]
        for each in differing
    ]
    table = [make_table(("tensor", "first", "second", "max abs", "relative"), rows)] if rows else []
    return as_text(*table, _summary(found))


def differences_json(found: Sequence[TensorDifference]) -> dict[str, Any]:
    """The same, as values."""
    return {
        "same": not any(each.differs for each in found),
        "summary": _summary(found),
        "tensors": len(found),
        "differing": [
            {
                "name": each.name,
                "first": each.first and {"shape": list(each.first.shape), "dtype": each.first.dtype},
                "second": each.second and {"shape": list(each.second.shape), "dtype": each.second.dtype},
                "max_abs": _value(each.max_abs),
                "relative": _value(each.relative),
            }
            for each in found
            if each.differs
        ],
    }


def _summary(found: Sequence[TensorDifference]) -> str:
    differing = [each for each in found if each.differs]
    if not differing:
        return f"the same: {len(found)} tensors"
    only = [sum(each.second is None for each in found), sum(each.first is None for each in found)]
    compared = [each for each in differing if each.max_abs is not None]
    parts = [f"{len(differing)} of {len(found)} tensors differ"]
    parts += [f"{count} only in the {side}" for count, side in zip(only, ("first", "second"), strict=True) if count]
    if compared:
        worst = max(compared, key=lambda each: each.max_abs or 0.0)
        parts.append(f"largest absolute difference {_number(worst.max_abs)} in {worst.name}")
    return "; ".join(parts)


def _described(header: Header | None) -> str:
    return ABSENT if header is None else f"{header.dtype} {list(header.shape)}"


def _value(value: float | None) -> float | str | None:
    """JSON has no infinity and no NaN."""
    return value if value is None or isfinite(value) else str(value)


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3g}"
