"""Floors: a module imports lower ones, or its own floor without going in circles; and what is public."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import equalize

ROOT = Path(equalize.__file__).parent

FLOORS = {
    0: {"errors", "version"},
    1: {"graph", "tracing", "recorder", "reader", "aten", "checkpoint", "data", "score"},
    2: {"branches", "sites", "scanning"},
    3: {"moments", "interpolated", "taps", "lean", "cut", "peers", "blocks", "measurement", "norms"},
    4: {"equation", "plan", "surgery", "strategies", "training", "calibration"},
    # 5: what one does with a plan; every module that is not named here
    6: {"cli", "__main__"},
}


def modules() -> dict[str, Path]:
    """Every module below `equalize`, by its dotted name without that prefix."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str) -> Iterator[str]:
    """The modules of this package that a module imports, at the top or inside a function."""
    package = ("equalize." + name).split(".")
    if MODULES[name].name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else str(node.module)
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target.split(".")[0] == "equalize":
                yield longest_module(target.removeprefix("equalize").removeprefix("."))


def longest_module(dotted: str) -> str:
    while dotted and dotted not in MODULES:
        dotted = dotted.rpartition(".")[0]
    return dotted


def floor(name: str) -> int:
    top = name.split(".")[0]
    return next((number for number, names in FLOORS.items() if top in names), 5)


def test_the_table_names_modules_that_exist():
    tops = {name.split(".")[0] for name in MODULES}
    assert {name for names in FLOORS.values() for name in names} <= tops


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_modules_import_no_higher_floor(name):
    for other in imported(name):
        assert other, f"{name} imports from the package itself: name the module"
        assert floor(other) <= floor(name), f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})"


def test_imports_go_in_no_circles():
    """A package's `__init__` gathers its modules; they don't import it in turn."""
    edges = {name: set(imported(name)) - {name} for name in MODULES if name}
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in edges[name]:
                walk(other, (*way, name))
            done.add(name)

    for name in edges:
        walk(name, ())


@pytest.mark.parametrize("name", ["graph", "branches", "sites", "errors", "version"])
def test_pure_python_modules(name):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    tops = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert tops <= {*sys.stdlib_module_names, "equalize"}


@pytest.mark.parametrize("statement", ["import equalize; equalize.__version__", "import equalize.sites, equalize.plan"])
def test_importing_costs_no_torch(statement):
    heavy = "{'torch', 'transformers', 'torchvision', 'numpy'} & set(sys.modules)"
    code = f"import sys; {statement}; sys.exit(str({heavy}) if {heavy} else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_public_names():
    """The Python interface that others build on, and what its signatures speak of."""
    assert equalize.__all__ == sorted(equalize.__all__)
    contract = {"load", "scan", "measure", "make_plan", "calibrate", "apply", "attach", "fold"}
    kinds = {"Branch", "Checkpoint", "Edit", "EqualizeError", "Moments", "Plan", "Refusal", "Scan", "Site"}
    assert set(equalize.__all__) == contract | kinds | {"__version__"}
    assert set(dir(equalize)) >= set(equalize.__all__)
    for name in equalize.__all__:
        assert getattr(equalize, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'equalise'"):
        _ = equalize.equalise


@pytest.mark.parametrize("name", sorted(contract for contract in MODULES if contract and floor(contract) <= 4))
def test_all_names_what_there_is(name):
    module = importlib.import_module(f"equalize.{name}")
    for public in getattr(module, "__all__", []):
        assert hasattr(module, public), f"{name}.__all__ has {public}"


def test_only_tracing_names_torch_export():
    """`graph.py` and above speak of ops, not of ATen."""
    users = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and str(node.module).startswith(("torch.export", "torch.fx")))
        or (isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.export", "torch.ops")))
    }
    assert users <= {"tracing", "recorder", "reader", "aten", "cut", "lean", "interpolated"}
