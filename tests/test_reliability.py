"""docs/reliability.md promises nothing that no test shows."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_every_test_that_is_named_exists() -> None:
    text = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 40 and text.count("::") == len(named)
    defined = {
        (path, node.name)
        for path in {path for path, _ in named}
        for node in ast.parse((REPOSITORY / path).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert [entry for entry in named if entry not in defined] == []
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| fault", "|--"))]
    assert all(line.count("`tests/") >= 1 for line in rows)
