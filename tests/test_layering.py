"""Imports go down the layers, and the driver starts without torch.

Layers as in the design. Packages of one layer never meet; the single modules of L0 and L1 may use each other (records
raise the errors, parallel stands on platform), but only inside their own layer or below.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import megatron_tspin

PACKAGE = "megatron_tspin"
ROOT = Path(megatron_tspin.__file__).parent
LAYERS = [
    {
        "errors",
        "config",
        "config_generation",
        "config_launch",
        "config_precision",
        "config_section",
        "config_source",
        "heartbeat",
        "rank_stderr",
        "rank_variables",
        "yaml_source",
        "log",
        "provenance",
        "records",
        "run_folder",
        "step_metrics",
        "stop_request",
        "storage",
    },
    {"platform", "lost_rank", "parallel", "precision", "rendezvous"},
    {"models", "data"},
    {"checkpoint", "objective"},
    {"conversion", "training", "generation"},
    {"selfplay", "report", "benchmark", "doctor"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
HEAVY = {"torch", "megatron", "transformers", "transformer_engine"}
DRIVER = ("selfplay", "report", "data.annotated", "data.user_examples", "cli.main", "__main__")


def modules() -> dict[str, Path]:
    """Module name without the package's, by file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, in_functions: bool = True, for_types: bool = True) -> Iterator[tuple[int, str]]:
    """(line, imported name) of every import.

    Args:
        path: The module.
        in_functions: Whether those count that run when a function does.
        for_types: Whether those under TYPE_CHECKING count, which never run.
    """
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif not in_functions and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif not for_types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
        else:
            pending.extend(ast.iter_child_nodes(node))


def import_graph(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules of ours that it ever imports while it runs, be it inside a function."""
    return {
        module: {target for _, name in imports(path, for_types=False) if (target := own_module(name))} - {module}
        for module, path in files.items()
    }


def a_cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of a cycle, each imported by the next or importing it, the first one again at the end; [] if none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle
    return []


def own_module(name: str) -> str | None:
    """The module of this package that an imported name is or belongs to; None for other packages."""
    if name != PACKAGE and not name.startswith(f"{PACKAGE}."):
        return None
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts)


def test_every_module_has_a_layer() -> None:
    without = {name.split(".")[0] for name in MODULES} - set(LEVEL) - {"", "__main__"}
    assert not without


def test_imports_only_go_down() -> None:
    wrong = []
    for module, path in MODULES.items():
        here = module.split(".")[0]
        if here in ("", "__main__"):
            continue
        for line, name in imports(path):
            target = own_module(name)
            there = target.split(".")[0] if target else ""
            if not there or there == here:
                continue
            single_modules = LEVEL[here] <= 1
            if LEVEL[there] > LEVEL[here] or (LEVEL[there] == LEVEL[here] and not single_modules):
                wrong.append(f"{path}:{line}: {here} (L{LEVEL[here]}) imports {name} (L{LEVEL[there]})")
    assert not wrong, "\n".join(wrong)


def test_modules_have_no_import_cycles() -> None:
    """Nor through imports in functions."""
    assert not a_cycle(import_graph(MODULES))


def test_packages_are_empty_but_for_a_docstring() -> None:
    for module, path in MODULES.items():
        if path.name == "__init__.py" and module:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert ast.get_docstring(tree) and len(tree.body) == 1, path


def closure(roots: tuple[str, ...]) -> dict[str, str]:
    """What starting the roots imports: external package -> the module of ours that asks for it."""
    pending = [name for name in MODULES if any(name == root or name.startswith(f"{root}.") for root in roots)]
    assert pending
    seen, external = set(pending), {}
    while pending:
        module = pending.pop()
        for _, name in imports(MODULES[module], in_functions=False, for_types=False):
            target = own_module(name)
            if target is None:
                external[name.split(".")[0]] = module
            elif target and target not in seen:
                seen.add(target)
                pending.append(target)
    return external


@pytest.mark.parametrize("root", DRIVER)
def test_the_driver_asks_for_nothing_heavy(root: str) -> None:
    heavy = {name: by for name, by in closure((root,)).items() if name in HEAVY}
    assert not heavy


@pytest.mark.processes
def test_the_driver_starts_without_torch() -> None:
    """The same for what other packages import in turn."""
    drivers = [f"{PACKAGE}.{name}" for name in MODULES if name.startswith(("selfplay.", "report."))]
    names = [*drivers, f"{PACKAGE}.data.annotated", f"{PACKAGE}.cli.main"]
    code = f"import importlib, sys\nfor n in {names}: importlib.import_module(n)\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent, timeout=120
    )
    assert not HEAVY & set(done.stdout.split())


def test_this_test_sees_imports(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(
        "import a\nfrom b.c import d\nif TYPE_CHECKING:\n    import e\nelse:\n    import f\n"
        "def g():\n    import h\nclass I:\n    import j\ntry:\n    import k\nexcept ImportError:\n    pass\n"
    )
    assert {name for _, name in imports(path)} == {"a", "b.c.d", "e", "f", "h", "j", "k"}
    assert {name for _, name in imports(path, for_types=False)} == {"a", "b.c.d", "f", "h", "j", "k"}
    assert {name for _, name in imports(path, in_functions=False, for_types=False)} == {"a", "b.c.d", "f", "j", "k"}
    assert own_module("megatron_tspin.config.Config") == "config"
    assert own_module("megatron_tspin.data.annotated.read_examples") == "data.annotated"
    assert own_module("torch.nn") is None


def test_this_test_sees_cycles(tmp_path: Path) -> None:
    """One through a function counts; one through annotations, whose imports never run, does not."""
    errors, log, storage = (tmp_path / f"{name}.py" for name in ("errors", "log", "storage"))
    errors.write_text(f"def f():\n    import {PACKAGE}.log\n")
    log.write_text(f"from {PACKAGE} import storage\n")
    storage.write_text(f"if TYPE_CHECKING:\n    from {PACKAGE}.errors import InputError\n")
    files = {path.stem: path for path in (errors, log, storage)}
    assert a_cycle(import_graph(files)) == []
    storage.write_text(f"class C:\n    def g(self):\n        from {PACKAGE}.errors import InputError\n")
    assert set(a_cycle(import_graph(files))) == set(files)
